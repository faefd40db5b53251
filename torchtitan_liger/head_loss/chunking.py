"""How many tokens share one piece of logits: integer arithmetic from a byte budget.

The answer depends on shapes and dtypes alone, so every rank of a mesh gets the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20

# The budget when the user gives none.
# GPU: 1 GiB is the knee on one H200: 4,096 rows of a 128,256-word vocabulary in bf16 run
# within 2 % of the fastest chunk size.
# CPU: the products stop gaining at a few hundred rows; beyond that the sweeps only leave
# the cache.
DEFAULT_BUDGET_MIB = {"cpu": 32}
DEFAULT_BUDGET_MIB_GPU = 1024


@dataclass(frozen=True)
class ChunkPlan:
    """The pieces in which a call goes through the logits."""

    tokens_per_chunk: int
    num_chunks: int
    logits_bytes: int  # the most that logits and what they turn into take at one time
    full_logits_bytes: int  # what the logits of all tokens alone would take

    def __str__(self) -> str:
        return (
            f"at most {_human(self.logits_bytes)} for logits "
            f"({self.num_chunks} x {self.tokens_per_chunk} tokens) "
            f"where all logits would take {_human(self.full_logits_bytes)}"
        )


def budget_bytes(logits_memory_mib: int, device_type: str) -> int:
    """Bytes that the logits of one chunk may take; `logits_memory_mib` 0 is the default."""
    return MIB * (
        logits_memory_mib or DEFAULT_BUDGET_MIB.get(device_type, DEFAULT_BUDGET_MIB_GPU)
    )


def plan_chunks(
    num_tokens: int,
    vocab_size: int,
    *,
    itemsize: int,
    bytes_per_logit: int,
    budget: int,
) -> ChunkPlan:
    """Cut `num_tokens` into the fewest equal chunks whose logits fit into `budget` bytes.

    A chunk has at least one token, so a budget below one row of logits is exceeded by
    that one row.

    Args:
        vocab_size: columns on this rank.
        itemsize: bytes of one logit.
        bytes_per_logit: bytes that the engine needs for each logit of a chunk.
    """
    most = max(1, budget // max(1, vocab_size * bytes_per_logit))
    # Matrix products like full tiles, and the last chunk should not be a scrap.
    tile = next((t for t in (128, 64, 32, 16) if most >= 4 * t), 1)
    most -= most % tile
    rows = _cdiv(num_tokens, max(1, _cdiv(num_tokens, most)))
    rows = max(1, min(_cdiv(rows, tile) * tile, num_tokens))
    return make_plan(num_tokens, rows, vocab_size, itemsize, bytes_per_logit)


def make_plan(
    num_tokens: int,
    tokens_per_chunk: int,
    vocab_size: int,
    itemsize: int,
    bytes_per_logit: int,
) -> ChunkPlan:
    """The plan for a given chunk size; the arguments are those of `plan_chunks`."""
    return ChunkPlan(
        tokens_per_chunk=tokens_per_chunk,
        num_chunks=_cdiv(num_tokens, tokens_per_chunk),
        logits_bytes=min(tokens_per_chunk, num_tokens) * vocab_size * bytes_per_logit,
        full_logits_bytes=num_tokens * vocab_size * itemsize,
    )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _human(num_bytes: int) -> str:
    if num_bytes >= 1024 * MIB:
        return f"{num_bytes / (1024 * MIB):.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"
