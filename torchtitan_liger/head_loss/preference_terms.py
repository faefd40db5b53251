"""Terms on answers of which some are better than others. `C` tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from torchtitan_liger.head_loss.options import check_number
from torchtitan_liger.head_loss.sequences import Sequences
from torchtitan_liger.head_loss.statistics import Statistics
from torchtitan_liger.head_loss.terms import Rows, SequenceTerm, check_choice

PreferenceKind = Literal["dpo", "cpo", "ipo", "simpo", "orpo"]
PreferenceLayout = Literal["pairs", "halves"]


@dataclass(frozen=True)
class Preference(SequenceTerm):
    """Prefer one answer to another: DPO and its family.

    With each sequence's sum of log p_y over its tokens, `S`, and their mean, `M`; d(x) is
    x of the chosen sequence minus x of the rejected one, 0 for one without a label:

        "dpo"    -log sigmoid(beta d(S - S_ref))             (arXiv:2305.18290)
        "cpo"    -log sigmoid(beta d(S))                     (arXiv:2401.08417)
        "ipo"    (d(M - M_ref) - 1 / (2 beta)) ** 2          (arXiv:2310.12036)
        "simpo"  -log sigmoid(beta d(M) - gamma)             (arXiv:2405.14734)
        "orpo"   -beta log sigmoid(d(log(exp M / (1 - exp M))))   (arXiv:2403.07691)

    The chosen sequence is followed by the rejected one (`layout = "pairs"`), or all chosen
    ones come first (`layout = "halves"`). A pair's loss is spread evenly over its tokens,
    so the sum over tokens is the sum over pairs, and the number of pairs the normalizer.

    Reported for each token of a pair, so that with the number of tokens as the normalizer
    these are means over tokens, longer pairs counting more: the difference d above
    (`margin`, without beta), whether it is positive (`accuracy`), and what it is the
    difference of (`chosen`, `rejected`).

    Rows: `ref_logp` for "dpo" and "ipo".
    """

    kind: PreferenceKind = "dpo"
    beta: float = 0.1
    gamma: float = 0.5
    layout: PreferenceLayout = "pairs"
    weight: float = 1.0
    name: str = "preference"
    metric_names = ("accuracy", "margin", "chosen", "rejected")

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, PreferenceKind)
        check_choice("layout", self.layout, PreferenceLayout)
        wanted = "finite and positive"
        check_number("beta", self.beta, wanted, lambda x: 0 < x < math.inf)
        check_number("gamma", self.gamma, "a finite number", math.isfinite)

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset({"ref_logp"} if self.kind in ("dpo", "ipo") else ())

    @property
    def sequences_per_group(self) -> int | None:
        return 2 if self.layout == "pairs" else None

    def sequence_loss(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> torch.Tensor:
        chosen, rejected, pairs = self._scores(stats, rows, sequences)
        margin = chosen - rejected
        log_sigmoid = torch.nn.functional.logsigmoid
        if self.kind in ("dpo", "cpo"):
            loss = -log_sigmoid(self.beta * margin)
        elif self.kind == "ipo":
            loss = (margin - 1 / (2 * self.beta)).square()
        elif self.kind == "simpo":
            loss = -log_sigmoid(self.beta * margin - self.gamma)
        else:
            loss = -self.beta * log_sigmoid(margin)
        return pairs.spread(loss / pairs.lengths(stats.logp))

    def sequence_metrics(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> Sequence[torch.Tensor]:
        chosen, rejected, pairs = self._scores(stats, rows, sequences)
        margin = chosen - rejected
        return [pairs.spread(x) for x in (margin > 0, margin, chosen, rejected)]

    def _scores(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, Sequences]:
        """What `d` subtracts, of the chosen and of the rejected sequence of each pair;
        and the pairs."""
        if sequences.num % 2:
            raise ValueError(
                f"preferences need pairs of sequences, got {sequences.num} sequences"
            )
        logp = stats.logp
        if self.kind in ("dpo", "ipo"):
            logp = logp - rows["ref_logp"]
        is_sum = self.kind in ("dpo", "cpo")
        score = sequences.sum(logp) if is_sum else sequences.mean(logp)
        if self.kind == "orpo":
            # log(p / (1 - p)) of p = exp(score), which rounds to 1 where it is sure.
            miss = -torch.expm1(score.clamp(max=-torch.finfo(score.dtype).eps))
            # As for the others, a sequence without any token counts 0: it is not sure.
            is_there = sequences.sum(torch.ones_like(logp)) > 0
            score = torch.where(is_there, score - miss.log(), 0.0)
        num = len(score) // 2
        if self.layout == "pairs":
            chosen, rejected, pair_C = score[0::2], score[1::2], sequences.ids_C // 2
        else:
            chosen, rejected, pair_C = score[:num], score[num:], sequences.ids_C % num
        return chosen, rejected, Sequences(pair_C, num, sequences.valid_C)


@dataclass(frozen=True)
class UnpairedPreference(SequenceTerm):
    """Prefer desirable answers to others, each on its own: KTO (arXiv:2402.01306).

    With `r`, a sequence's sum of log p_y - ref_logp over its tokens, and `z`, the reference
    point:

        desirable_weight (1 - sigmoid(beta (r - z)))      of a desirable sequence
        undesirable_weight (1 - sigmoid(beta (z - r)))    of another

    `z` is a constant, the same for all: in the paper, the mean of `r` over answers to other
    prompts, at least 0. With 0 it is APO-zero (arXiv:2408.06266). A sequence's loss is
    spread evenly over its tokens, so the sum over tokens is the sum over sequences, and
    their number the normalizer.

    Reported for each token, so that with the number of tokens as the normalizer these are
    means over tokens, longer sequences counting more: whether r - z has the right sign
    (`accuracy`), whether the sequence is `desirable`, and `r`, of desirable sequences
    (`chosen`, else 0) and of others (`rejected`, else 0). The mean over desirable ones is
    then `chosen` / `desirable`, and over others `rejected` / (1 - `desirable`).

    Rows: `ref_logp`; `desirable`, True or 1 on all tokens of such a sequence, else 0;
    `reference_point`.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    weight: float = 1.0
    name: str = "kto"
    inputs = frozenset({"ref_logp", "desirable", "reference_point"})
    metric_names = ("accuracy", "desirable", "chosen", "rejected")

    def __post_init__(self) -> None:
        wanted = "finite and positive"
        check_number("beta", self.beta, wanted, lambda x: 0 < x < math.inf)
        for name in ("desirable_weight", "undesirable_weight"):
            wanted = "finite and at least 0"
            check_number(name, getattr(self, name), wanted, lambda x: 0 <= x < math.inf)

    def sequence_loss(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> torch.Tensor:
        _, margin, is_desirable = self._gains(stats, rows, sequences)
        margin = self.beta * margin
        is_right = margin > 0
        # Of the side where it is small: beside 1 there is nothing left of its slope.
        small = torch.sigmoid(torch.where(is_right, -margin, margin))
        loss = torch.where(is_right, small, 1 - small)
        good, bad = self.desirable_weight * loss, self.undesirable_weight * loss
        lengths = sequences.lengths(stats.logp)
        return torch.where(is_desirable, good, bad) / sequences.spread(lengths)

    def sequence_metrics(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> Sequence[torch.Tensor]:
        gain, margin, is_desirable = self._gains(stats, rows, sequences)
        chosen = torch.where(is_desirable, gain, 0.0)
        # No difference: of infinite gains it is NaN.
        rejected = torch.where(is_desirable, 0.0, gain)
        return [margin > 0, is_desirable, chosen, rejected]

    def _gains(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`r` of each token's sequence, how far it is on the right side of `z`, and whether
        the sequence is desirable; each [C]."""
        gain = sequences.spread(sequences.sum(stats.logp - rows["ref_logp"]))
        above, is_desirable = gain - rows["reference_point"], rows["desirable"] > 0
        return gain, torch.where(is_desirable, above, -above), is_desirable
