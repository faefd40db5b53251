"""The softmax over a vocabulary whose columns lie on several ranks.

Each rank sweeps its own columns; one all-gather per chunk exchanges a few numbers per
row, whatever the terms. `C` tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from torchtitan_liger.head_loss.sweeps import LocalStatistics
from torchtitan_liger.head_loss.terms import Statistics


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds.

    Shards may be uneven and even empty; together, in the group's order, they cover the
    vocabulary once.
    """

    start: int  # first column
    vocab_size: int  # columns of all ranks
    widest: int  # columns of the largest shard: all ranks cut their tokens alike
    group: dist.ProcessGroup


class GlobalStatistics:
    """Statistics over all columns, and what a rank needs to return to its own.

    Sum and maximum are kept apart: `exp(z - max) / sumexp` is exact to the last bits
    where `exp(z - logsumexp)` is not.
    """

    def __init__(
        self, local: LocalStatistics, vocab_size: int, group: dist.ProcessGroup | None
    ) -> None:
        total = local if group is None else _combine(local, group)
        self._local_max_C = local.max
        self._total = total
        self._vocab_size = vocab_size

    def for_terms(self) -> Statistics:
        max_C, sumexp_C, label_logit_C, logit_sum_C, shifted_sum_C = self._total
        log_sumexp_C = sumexp_C.log()
        lse_C = max_C + log_sumexp_C
        return Statistics(
            logp=(label_logit_C - max_C) - log_sumexp_C,
            lse=lse_C,
            max_logp=-log_sumexp_C,
            uniform_ce=(
                None if logit_sum_C is None else lse_C - logit_sum_C / self._vocab_size
            ),
            entropy=(
                None
                if shifted_sum_C is None
                else log_sumexp_C - shifted_sum_C / sumexp_C
            ),
        )

    def log_softmax_shift(self) -> torch.Tensor:
        """What turns this rank's `z - local max` into the log of the softmax, [C]."""
        return self._local_max_C - self._total.max - self._total.sumexp.log()

    def softmax_scale(self) -> torch.Tensor:
        """What turns this rank's `exp(z - local max)` into the softmax, [C]."""
        return (self._local_max_C - self._total.max).exp() / self._total.sumexp


def _combine(local: LocalStatistics, group: dist.ProcessGroup) -> LocalStatistics:
    packed_kC = torch.stack([x for x in local if x is not None])
    gathered = packed_kC.new_empty(dist.get_world_size(group), *packed_kC.shape)
    dist.all_gather(list(gathered.unbind()), packed_kC, group=group)
    names = [name for name, x in local._asdict().items() if x is not None]
    by_name: dict[str, torch.Tensor] = dict(
        zip(names, gathered.unbind(dim=1), strict=True)
    )  # each [R, C]
    max_C = by_name["max"].amax(dim=0)
    shift_RC = by_name["max"] - max_C
    share_RC = shift_RC.exp()
    shifted_sum_C = None
    if "shifted_sum" in by_name:
        # An empty shard has a maximum of -inf and no share.
        moved_RC = by_name["shifted_sum"] + shift_RC * by_name["sumexp"]
        shifted_sum_C = torch.where(share_RC > 0, share_RC * moved_RC, 0.0).sum(dim=0)
    return LocalStatistics(
        max=max_C,
        sumexp=(share_RC * by_name["sumexp"]).sum(dim=0),
        label_logit=by_name["label_logit"].sum(dim=0),
        logit_sum=by_name["logit_sum"].sum(dim=0) if "logit_sum" in by_name else None,
        shifted_sum=shifted_sum_C,
    )
