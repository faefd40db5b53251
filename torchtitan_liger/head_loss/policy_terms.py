"""Terms on tokens that a policy sampled: reinforcement learning. `C` tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from torchtitan_liger.head_loss.options import check_number
from torchtitan_liger.head_loss.sequences import Sequences
from torchtitan_liger.head_loss.statistics import Statistics
from torchtitan_liger.head_loss.terms import Rows, SequenceTerm, Term, check_choice

PolicyGradientKind = Literal["ppo", "cispo", "reinforce"]
ReferenceKLKind = Literal["k1", "k2", "k3"]
# What terms with advantages report of each token; and those that have a ratio, the token's
# or its sequence's.
SAMPLED = ("new_logp", "advantage", "advantage/max", "advantage/min")
RATIO = ("old_logp", "ratio", "ratio_squared", "kl_new_old", "clip_fraction")


@dataclass(frozen=True)
class PolicyGradient(Term):
    """Clipped policy gradient on the tokens that were sampled.

    With `r = exp(log p_y - old_logp)` and the advantage `A`, per token:

        "ppo"        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)   (arXiv:1707.06347)
        "cispo"      -clip(r, 1 - clip_low, 1 + clip_high) A log p_y, the ratio constant
                     (arXiv:2506.13585)
        "reinforce"  -A log p_y

    GRPO and DAPO are "ppo" with their advantages, bounds and normalizer. With its
    `dual_clip` > 1, a token with A < 0 loses at most `-dual_clip * A` (arXiv:1912.09729).

    With `importance_cap` (truncated importance sampling), tokens are weighted by how much
    likelier they were under the policy of `old_logp` than under the one that generated
    them, a constant: min(exp(old_logp - generation_logp), importance_cap). For a weight per
    sequence give `token_weights`.

    Reported for each token: `new_logp` (log p_y), `old_logp`; `advantage`, and its extremes
    `advantage/max` and `advantage/min`; `ratio` and, for its variance, `ratio_squared`;
    `kl_new_old`, r - 1 - log r, whose mean estimates KL(old | new); `clip_fraction`, whether
    r is beyond a bound, whatever the sign of A.

    Rows: `advantages`; `old_logp` (not for "reinforce" without a cap);
    `generation_logp` with a cap.
    """

    kind: PolicyGradientKind = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    importance_cap: float | None = None
    weight: float = 1.0
    name: str = "policy_gradient"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, PolicyGradientKind)
        _check_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            check_number("dual_clip", self.dual_clip, "above 1", lambda x: x > 1)
            if self.kind != "ppo":
                raise ValueError(f'dual_clip is for "ppo" only, got kind {self.kind!r}')
        if (cap := self.importance_cap) is not None:
            check_number("importance_cap", cap, "positive", lambda x: x > 0)

    @property
    def inputs(self) -> frozenset[str]:
        names = {"advantages"}
        if self._has_ratio:
            names |= {"old_logp"}
        if self.importance_cap is not None:
            names |= {"old_logp", "generation_logp"}
        return frozenset(names)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*SAMPLED, *RATIO) if self._has_ratio else SAMPLED

    @property
    def _has_ratio(self) -> bool:
        return self.kind != "reinforce"

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        loss = self._loss(stats, rows)
        if self.importance_cap is None:
            return loss
        importance = torch.exp(rows["old_logp"] - rows["generation_logp"])
        return importance.clamp(max=self.importance_cap) * loss

    def _loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        advantages = rows["advantages"]
        if not self._has_ratio:
            return -(advantages * stats.logp)
        log_ratio = stats.logp - rows["old_logp"]
        if self.kind == "ppo":
            bounds = self.clip_low, self.clip_high, self.dual_clip
            return _clipped_loss(log_ratio, advantages, *bounds)
        ratio = log_ratio.detach().exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -clipped * advantages * stats.logp

    def metrics(self, stats: Statistics, rows: Rows) -> Sequence[torch.Tensor]:
        if not self._has_ratio:
            return _of_samples(stats, rows)
        log_ratio = stats.logp - rows["old_logp"]
        bounds = self.clip_low, self.clip_high
        return [*_of_samples(stats, rows), *_of_ratios(log_ratio, rows, *bounds)]


@dataclass(frozen=True)
class ReferenceKL(Term):
    """Distance from a reference policy, estimated on the sampled token.

    With `d = ref_logp - log p_y`: "k1" -d, "k2" d^2 / 2, "k3" exp(d) - 1 - d
    (joschu.net/blog/kl-approx.html). Rows: `ref_logp`.
    """

    weight: float
    kind: ReferenceKLKind = "k3"
    name: str = "reference_kl"
    inputs = frozenset({"ref_logp"})

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ReferenceKLKind)

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        d = rows["ref_logp"] - stats.logp
        if self.kind == "k1":
            return -d
        return d.square() / 2 if self.kind == "k2" else torch.expm1(d) - d


@dataclass(frozen=True)
class SequencePolicyGradient(SequenceTerm):
    """GSPO: one ratio for a whole sequence (arXiv:2507.18071).

    With `s = exp(mean over the sequence of (log p_y - old_logp))`, every token of it has
    the loss -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), with its own advantage `A`.
    The paper's mean over a sequence's tokens is for the caller: `token_weights` of
    1 / length, and the number of sequences as the normalizer.

    Reported are the metrics of `PolicyGradient`, with the sequence's ratio for each token.

    Rows: `advantages`, `old_logp`.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    weight: float = 1.0
    name: str = "gspo"
    inputs = frozenset({"advantages", "old_logp"})
    metric_names = (*SAMPLED, *RATIO)

    def __post_init__(self) -> None:
        _check_clip(self.clip_low, self.clip_high)

    def sequence_loss(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> torch.Tensor:
        log_ratio = self._log_ratio(stats, rows, sequences)
        return _clipped_loss(
            log_ratio, rows["advantages"], self.clip_low, self.clip_high
        )

    def sequence_metrics(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> Sequence[torch.Tensor]:
        log_ratio = self._log_ratio(stats, rows, sequences)
        bounds = self.clip_low, self.clip_high
        return [*_of_samples(stats, rows), *_of_ratios(log_ratio, rows, *bounds)]

    def _log_ratio(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> torch.Tensor:
        """[C] that of each token's sequence."""
        return sequences.spread(sequences.mean(stats.logp - rows["old_logp"]))


def _clipped_loss(
    log_ratio_C: torch.Tensor,
    advantages_C: torch.Tensor,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and at most -dual_clip A where A < 0."""
    # Where a bound makes the loss a constant, a larger ratio is none of its business: of an
    # infinite one, as of a token that the sampler gave no probability, the gradient would
    # be 0 * inf.
    is_bad_C = advantages_C < 0
    constant_C = torch.where(is_bad_C, dual_clip or math.inf, 1 + high)
    ratio_C = torch.exp(torch.minimum(log_ratio_C, constant_C.log() + 1))
    clipped_C = ratio_C.clamp(1 - low, 1 + high)
    loss_C = torch.maximum(-ratio_C * advantages_C, -clipped_C * advantages_C)
    if dual_clip is None:
        return loss_C
    bounded_C = torch.minimum(loss_C, -dual_clip * advantages_C)
    return torch.where(is_bad_C, bounded_C, loss_C)


def _of_samples(stats: Statistics, rows: Rows) -> list[torch.Tensor]:
    """`SAMPLED`, of each token."""
    advantages = rows["advantages"]
    return [stats.logp, advantages, advantages, advantages]


def _of_ratios(
    log_ratio_C: torch.Tensor, rows: Rows, low: float, high: float
) -> list[torch.Tensor]:
    """`RATIO`, of each token; the KL is estimated as "k3" of `ReferenceKL`."""
    ratio_C = log_ratio_C.exp()
    outside_C = (ratio_C < 1 - low) | (ratio_C > 1 + high)
    kl_C = torch.expm1(log_ratio_C) - log_ratio_C
    kl_C = torch.where(log_ratio_C == math.inf, math.inf, kl_C)  # not inf - inf
    return [rows["old_logp"], ratio_C, ratio_C.square(), kl_C, outside_C]


def _check_clip(low: float, high: float) -> None:
    check_number("clip_low", low, "in [0, 1]", lambda x: 0 <= x <= 1)
    check_number("clip_high", high, "at least 0", lambda x: x >= 0)
