"""What the head's loss consists of, over the micro-batches and the ranks of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from torchtitan_liger.head_loss import HeadLossOutput
from torchtitan_liger.head_loss.evaluate import is_extreme


class _Reduction(NamedTuple):
    over_micro_batches: Callable[..., torch.Tensor]
    over_ranks: dist.ReduceOp.RedOpType


_REDUCTIONS = {
    "sum": _Reduction(torch.sum, dist.ReduceOp.SUM),
    "max": _Reduction(torch.amax, dist.ReduceOp.MAX),
    "min": _Reduction(torch.amin, dist.ReduceOp.MIN),
}


class HeadLossReport:
    """Collects the terms and metrics of a step's micro-batches.

    They are shares of a sum, divided by the number of tokens of all ranks; those whose
    name ends in "/max" or "/min" are what the name says.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, torch.Tensor]] = []
        self._num_tokens: torch.Tensor | float = 0

    def clear(self) -> None:
        self._parts.clear()

    def add(self, output: HeadLossOutput, *, num_tokens: torch.Tensor | float) -> None:
        """Add a micro-batch. Waits for nothing.

        Args:
            num_tokens: how many have a label, in the whole step and on all ranks.
        """
        self._num_tokens = num_tokens
        self._parts.append({**output.terms, **output.metrics})

    def values(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """The values over all micro-batches and the ranks of `group`; none without a label.

        One collective, one more where there are maxima, and one where there are minima.
        """
        found: dict[str, float] = {}
        names = list(self._parts[0]) if self._parts and self._num_tokens else []
        for kind, reduction in _REDUCTIONS.items():
            alike = [name for name in names if _kind(name) == kind]
            if not alike:
                continue
            rows = [
                torch.stack([part[n].float() for n in alike]) for part in self._parts
            ]
            packed = reduction.over_micro_batches(torch.stack(rows), dim=0)
            if group is not None:
                dist.all_reduce(packed, reduction.over_ranks, group)
            found.update(zip(alike, packed.tolist(), strict=True))
        return {name: found[name] for name in names}


def _kind(name: str) -> str:
    return name.rpartition("/")[2] if is_extreme(name) else "sum"
