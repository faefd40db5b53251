"""What the head's loss consists of, over the micro-batches and the ranks of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from torchtitan_liger.head_loss import HeadLossOutput
from torchtitan_liger.head_loss.evaluate import is_extreme, signed


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

        One collective, and one more where there are extremes.
        """
        found: dict[str, float] = {}
        names = list(self._parts[0]) if self._parts and self._num_tokens else []
        for extreme in (False, True):
            alike = [name for name in names if is_extreme(name) == extreme]
            if not alike:
                continue
            rows = [
                torch.stack([signed(n, part[n].float()) for n in alike])
                for part in self._parts
            ]
            packed = torch.stack(rows)
            packed = packed.amax(dim=0) if extreme else packed.sum(dim=0)
            if group is not None:
                op = dist.ReduceOp.MAX if extreme else dist.ReduceOp.SUM
                dist.all_reduce(packed, op, group)
            found.update(zip(alike, packed.tolist(), strict=True))
        return {name: signed(name, found[name]) for name in names}
