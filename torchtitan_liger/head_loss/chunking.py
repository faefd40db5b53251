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

    num_tokens: int
    tokens_per_chunk: int
    num_chunks: int
    logits_bytes: int  # of one chunk: the most that exists at one time
    full_logits_bytes: int  # of all tokens: what logits in one piece would take

    def __str__(self) -> str:
        return (
            f"{_human(self.logits_bytes)} of logits at a time "
            f"({self.num_chunks} x {self.tokens_per_chunk} tokens) "
            f"instead of {_human(self.full_logits_bytes)}"
        )


def budget_bytes(logits_memory_mib: int, device_type: str) -> int:
    """Bytes that the logits of one chunk may take; `logits_memory_mib` 0 is the default."""
    return MIB * (
        logits_memory_mib or DEFAULT_BUDGET_MIB.get(device_type, DEFAULT_BUDGET_MIB_GPU)
    )


def plan_chunks(
    num_tokens: int, vocab_size: int, *, bytes_per_logit: int, budget: int
) -> ChunkPlan:
    """Cut `num_tokens` into the fewest equal chunks whose logits fit into `budget` bytes.

    A chunk has at least one token, so a budget below one row of logits is exceeded by
    that one row. `vocab_size` is the number of columns on this rank.
    """
    row_bytes = max(1, vocab_size * bytes_per_logit)
    most = max(1, budget // row_bytes)
    num_chunks = max(1, _cdiv(num_tokens, most))
    tokens_per_chunk = max(1, _cdiv(num_tokens, num_chunks))
    # Matrix products like full tiles; equal chunks like no remainder. Round up where the
    # budget allows it.
    for tile in (128, 64, 32, 16):
        rounded = _cdiv(tokens_per_chunk, tile) * tile
        if tile < tokens_per_chunk and rounded <= most:
            tokens_per_chunk = min(rounded, num_tokens)
            break
    return make_plan(num_tokens, tokens_per_chunk, row_bytes)


def make_plan(num_tokens: int, tokens_per_chunk: int, row_bytes: int) -> ChunkPlan:
    """The plan for a given chunk size; `row_bytes` is the size of one token's logits."""
    return ChunkPlan(
        num_tokens=num_tokens,
        tokens_per_chunk=tokens_per_chunk,
        num_chunks=_cdiv(num_tokens, tokens_per_chunk),
        logits_bytes=min(tokens_per_chunk, num_tokens) * row_bytes,
        full_logits_bytes=num_tokens * row_bytes,
    )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _human(num_bytes: int) -> str:
    if num_bytes >= 1024 * MIB:
        return f"{num_bytes / (1024 * MIB):.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"
