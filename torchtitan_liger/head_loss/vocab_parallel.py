"""The softmax over a vocabulary whose columns lie on several ranks.

Each rank sweeps its own columns; one all-gather per chunk exchanges a few numbers per
row, whatever the terms; a JSD adds an all-reduce. `C` tokens of a chunk, `R` ranks, `k`
numbers, `D` width, `v` this rank's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from torchtitan_liger.head_loss.statistics import Sums, combine, unpack


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds.

    Shards may be uneven and even empty; together, in the group's order, they cover the
    vocabulary once. That they do nobody looks at; `linear_cross_entropy` learns it from
    the ranks itself.
    """

    start: int
    """The first column."""
    vocab_size: int
    """Columns of all ranks."""
    widest: int
    """Columns of the largest shard: all ranks cut their tokens alike."""
    group: dist.ProcessGroup
    """The ranks."""


def check_shard(shard: VocabShard, num_columns: int) -> None:
    """
    Raises:
        ValueError: where a weight with so many rows cannot be this shard.
    """
    if not isinstance(shard, VocabShard):
        raise ValueError(f"shard must be a VocabShard, got {shard!r}")
    numbers = shard.start, shard.vocab_size, shard.widest
    fits = (
        all(isinstance(x, int) for x in numbers)
        and 0 <= shard.start <= shard.start + num_columns <= shard.vocab_size
        and num_columns <= shard.widest <= shard.vocab_size
    )
    if not fits or shard.group is None:
        raise ValueError(f"a weight of {num_columns} rows is no {shard}")


def exchange(
    names: Sequence[str], packed_kC: torch.Tensor, shard: VocabShard | None
) -> Callable[[], Sums]:
    """Begin to put together the sums of all ranks; the function that is returned waits.

    What is queued in between on the same stream runs beside the exchange.
    """
    if shard is None:
        return lambda: unpack(names, packed_kC)
    num_ranks = dist.get_world_size(shard.group)
    gathered_RkC = packed_kC.new_empty(num_ranks, *packed_kC.shape)
    work = dist.all_gather(
        list(gathered_RkC.unbind()), packed_kC, group=shard.group, async_op=True
    )

    def wait() -> Sums:
        work.wait()
        return combine(names, gathered_RkC)

    return wait


def add_up(shares: torch.Tensor, shard: VocabShard | None) -> torch.Tensor:
    """The sum over all ranks, in place."""
    if shard is not None:
        dist.all_reduce(shares, group=shard.group)
    return shares


# Of each weight, by group: how many columns it has, and the shard.
_shards: Any = WeakTensorKeyDictionary()


@torch.compiler.disable(reason="ranks exchange the sizes of their shards")
def shard_of(weight_vD: torch.Tensor, group: dist.ProcessGroup) -> VocabShard:
    """Which columns the weight holds; a collective, once for each weight.

    Not once for each size: ranks may have one in common where others have two.

    Raises:
        ValueError: for what is no group; for a weight that has another size than at its
            first call: other ranks would have to know.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"tp_group must be a process group, such as a mesh's get_group(), got {group!r}"
        )
    of_weight = _shards.setdefault(weight_vD, {})
    if group not in of_weight:
        size = torch.tensor([len(weight_vD)], device=weight_vD.device)
        sizes = size.new_empty(dist.get_world_size(group))
        dist.all_gather(list(sizes.split(1)), size, group=group)
        columns = sizes.tolist()
        shard = VocabShard(
            start=sum(columns[: dist.get_rank(group)]),
            vocab_size=sum(columns),
            widest=max(columns),
            group=group,
        )
        of_weight[group] = len(weight_vD), shard
    num_columns, shard = of_weight[group]
    if num_columns != len(weight_vD):
        raise ValueError(
            f"the weight had {num_columns} rows when it was first used with this tp_group, "
            f"and has {len(weight_vD)}: give each rank a new tensor instead"
        )
    return shard


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@torch.compiler.disable(reason="the backward pass adds up over ranks")
def replicated(hidden: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`hidden`, whose gradient is added up over the group."""
    return _Replicated.apply(hidden, group)
