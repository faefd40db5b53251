"""How many tokens share one piece of logits: integer arithmetic from a byte budget.

The answer depends on shapes and dtypes alone, so every rank of a mesh gets the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 2**20

# The chunk when the user gives no budget: few rows, but enough that the products do not
# wait for memory (each chunk reads and writes the whole gradient of the weight), and no
# more than a cap. On two CPU cores, with a vocabulary of 32,768 in float32, 256 rows take
# 1.2 times the time of 1,024. On an H200, with one of 128,256 in bfloat16 and a width of
# 4,096, 1,024 rows take 1.14 times the time of 16,384, 4,096 rows 1.02 and 8,192 rows 1.01.
DEFAULT_CPU = (1024, 256 * MIB)
DEFAULT_GPU = (8192, 2048 * MIB)


@dataclass(frozen=True)
class ChunkPlan:
    """The pieces in which a call goes through the logits."""

    tokens_per_chunk: int
    num_chunks: int
    logits_bytes: int  # the most that logits and what they turn into take at one time
    full_logits_bytes: int  # what those of all tokens would take
    most_tokens: int = 0  # that a chunk may have within the budget; 0 if nobody knows
    most_bytes: int = 0  # of fewer tokens, which may be in one larger chunk

    def __str__(self) -> str:
        return (
            f"at most {_human(max(self.logits_bytes, self.most_bytes))} for logits "
            f"({self.num_chunks} x {self.tokens_per_chunk} tokens) "
            f"where all logits would take {_human(self.full_logits_bytes)}"
        )


def budget_bytes(logits_memory_mib: int, device_type: str, row_bytes: int) -> int:
    """Bytes that all logits which exist at one time may take.

    Args:
        logits_memory_mib: the user's wish; 0 for the default of the device.
        row_bytes: what one token's logits take, in all buffers.
    """
    if logits_memory_mib:
        return logits_memory_mib * MIB
    rows, cap = DEFAULT_CPU if device_type == "cpu" else DEFAULT_GPU
    return min(rows * row_bytes, cap)


def plan_chunks(
    num_tokens: int,
    vocab_size: int,
    *,
    bytes_per_logit: int,
    budget: int,
    num_buffers: int = 1,
) -> ChunkPlan:
    """Cut `num_tokens` into the fewest equal chunks whose logits fit into `budget` bytes.

    A chunk has at least one token, so a budget below one row of logits is exceeded by
    that one row.

    Args:
        vocab_size: columns on this rank.
        bytes_per_logit: what a logit and what it turns into take.
        num_buffers: chunks that exist at one time.
    """
    row_bytes = vocab_size * bytes_per_logit * num_buffers
    most = max(1, budget // max(1, row_bytes))
    # Matrix products like full tiles, and the last chunk should not be a scrap.
    tile = next((t for t in (128, 64, 32, 16) if most >= 4 * t), 1)
    most -= most % tile
    rows = _cdiv(num_tokens, max(1, _cdiv(num_tokens, most)))
    rows = max(1, min(_cdiv(rows, tile) * tile, num_tokens))
    plan = make_plan(num_tokens, rows, vocab_size, bytes_per_logit, num_buffers)
    most = budget // max(1, row_bytes)
    return replace(plan, most_tokens=most, most_bytes=min(most, num_tokens) * row_bytes)


def make_plan(
    num_tokens: int,
    tokens_per_chunk: int,
    vocab_size: int,
    bytes_per_logit: int,
    num_buffers: int = 1,
) -> ChunkPlan:
    """The plan for a given chunk size; the arguments are those of `plan_chunks`."""
    at_once = min(tokens_per_chunk, num_tokens) * num_buffers
    return ChunkPlan(
        tokens_per_chunk=tokens_per_chunk,
        num_chunks=_cdiv(num_tokens, tokens_per_chunk),
        logits_bytes=at_once * vocab_size * bytes_per_logit,
        full_logits_bytes=num_tokens * vocab_size * bytes_per_logit,
    )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _human(num_bytes: int) -> str:
    if num_bytes >= 1024 * MIB:
        return f"{num_bytes / (1024 * MIB):.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"
