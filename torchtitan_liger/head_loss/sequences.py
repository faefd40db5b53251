"""Which tokens belong together, for terms over sequences. `T` or `C` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from torchtitan_liger.head_loss.calls import Call, per_token, without_bad
from torchtitan_liger.head_loss.checks import check_integers, is_whole
from torchtitan_liger.head_loss.chunking import ChunkPlan


class Sequences(NamedTuple):
    """The sequences of some tokens; those of a chunk count from zero."""

    ids_C: torch.Tensor  # int64 in [0, num), one sequence per number
    num: int
    valid_C: torch.Tensor  # whether the token has a label
    starts: tuple[int, ...] | None = None
    """The first token of each, and the end of the last, where one comes after the other."""
    cuts: tuple[tuple[int, int], ...] | None = None
    """Where chunks begin, and the last one ends: (token, sequence). None where chunks do not
    follow sequences."""

    def kept(
        self,
        kept_N: torch.Tensor,
        num_labeled: int | Sequence[int] | None,
        check_labels: bool,
    ) -> Sequences:
        """Those of the tokens with a label, in their order. Waits for a GPU only if
        `check_labels` has.

        Args:
            kept_N: the positions of these tokens.
            num_labeled: how many there are, or how many of each sequence, if known.
        """
        starts = counts = None
        if self.starts is not None:
            if isinstance(num_labeled, Sequence):
                counts = num_labeled
            elif check_labels or self.valid_C.device.type == "cpu":
                counts = self.valid_C.view(self.num, -1).sum(dim=1).tolist()
        if counts is not None:
            if len(counts) != self.num:
                raise ValueError(
                    f"num_labeled has {len(counts)} rows, but there are {self.num} sequences"
                )
            # Of others the loss is NaN; here is nothing to be learned from them.
            if sum(counts) == len(kept_N) and min(counts) >= 0:
                starts = tuple(accumulate(counts, initial=0))
        return Sequences(self.ids_C[kept_N], self.num, self.valid_C[kept_N], starts)

    def cut(
        self, plan: ChunkPlan, per_group: int
    ) -> tuple[ChunkPlan, Sequences] | None:
        """A plan, and `cuts`, with whole groups of `per_group` sequences in each chunk; None
        where a group is too long, or the tokens of a sequence are anywhere."""
        for most in (plan.tokens_per_chunk, plan.most_tokens):
            if (cuts := self._cuts(most, per_group)) is not None:
                longest = max(b - a for (a, _), (b, _) in pairwise(cuts))
                plan = replace(plan, tokens_per_chunk=longest, num_chunks=len(cuts) - 1)
                return plan, self._replace(cuts=cuts)
        return None

    def _cuts(self, most: int, per_group: int) -> tuple[tuple[int, int], ...] | None:
        if self.starts is None:
            return None
        cuts = [(0, 0)]
        for first in range(0, self.num, per_group):
            start = self.starts[first]
            end = self.starts[min(first + per_group, self.num)]
            if end - start > most:
                return None
            if end - cuts[-1][0] > most:
                cuts.append((start, first))
        return *cuts, (self.starts[-1], self.num)

    def part(self, tokens: slice) -> Sequences:
        """Those of a chunk between two of the `cuts`, or of all tokens."""
        if self.cuts is None:
            return self
        at = dict(self.cuts)
        first, end = at[tokens.start], at[tokens.stop]
        # Beyond them are only those of wrong counts, of which the loss is NaN.
        ids_C = (self.ids_C[tokens] - first).clamp(0, end - first - 1)
        return Sequences(ids_C, end - first, self.valid_C[tokens])

    def sum(self, x_C: torch.Tensor) -> torch.Tensor:
        """[num] sums over the tokens with a label."""
        # One by one in float32, thousands of tokens would lose some digits.
        wide_C = torch.where(self.valid_C, x_C, 0.0).double()
        sums = wide_C.new_zeros(self.num).index_add(0, self.ids_C, wide_C)
        return sums.to(torch.promote_types(x_C.dtype, torch.float32))

    def lengths(self, like: torch.Tensor) -> torch.Tensor:
        """[num] tokens with a label, at least 1, in the dtype of `like`."""
        return self.sum(torch.ones_like(like)).clamp(min=1)

    def mean(self, x_C: torch.Tensor) -> torch.Tensor:
        """[num] means over the tokens with a label; 0 for a sequence without any."""
        return self.sum(x_C) / self.lengths(x_C)

    def spread(self, of_each: torch.Tensor) -> torch.Tensor:
        """[num] -> [C]: to each token its sequence's. As exact backwards as `sum` is."""
        return of_each.double()[self.ids_C].to(of_each.dtype)


def sequences_of(
    call: Call,
    labels: torch.Tensor,
    sequence_ids: torch.Tensor | None,
    num_sequences: int | None,
    check_labels: bool,
) -> tuple[Call, Sequences]:
    """Those that the caller numbers, or else the rows of `labels`; and the call, whose scale
    is NaN if a token with a label belongs to no sequence.

    Raises:
        ValueError: for numbers that are none; with `check_labels` also for such a token.
    """
    if (sequence_ids is None) != (num_sequences is None):
        raise ValueError("sequence_ids and num_sequences belong together")
    if sequence_ids is None or num_sequences is None:
        length = labels.shape[-1] if labels.ndim else 1
        count = labels.numel() // max(1, length)
        ids_T = torch.arange(count, device=labels.device).repeat_interleave(
            length, output_size=labels.numel()
        )
        starts = tuple(range(0, labels.numel() + 1, max(1, length)))
        return call, Sequences(ids_T, count, call.valid_T, starts)
    ids_T = per_token("sequence_ids", sequence_ids, labels)
    check_integers("sequence_ids", ids_T)
    if not is_whole(num_sequences) or num_sequences < 1:
        raise ValueError(
            f"num_sequences must be a whole number, at least 1, got {num_sequences!r}"
        )
    known_T = (ids_T >= 0) & (ids_T < num_sequences)
    bad_T = call.valid_T & ~known_T  # an ignored token may belong to none
    rule = f"sequence_ids must be in [0, {num_sequences}) where there is a label"
    call = without_bad(call, ids_T, bad_T, rule, check_labels)
    ids_T = torch.where(call.valid_T & known_T, ids_T.long(), 0)
    return call, Sequences(ids_T, num_sequences, call.valid_T)
