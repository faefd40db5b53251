"""Losses as plain torch on per-row statistics of the softmax.

A term sees a few numbers per token, never the logits. The engine gets each term's partial
derivatives by autograd on those numbers and turns their sum into the gradient of the
logits in one sweep, so any mixture of terms costs one softmax.

A term of your own is a class with `name`, `weight`, `needs` and `loss`:

    @dataclass(frozen=True)
    class Squared:
        weight: float
        name: str = "squared"
        needs: frozenset[str] = frozenset()

        def loss(self, stats, rows):
            return stats.logp.square()

`C` tokens of a chunk, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from torchtitan_liger.head_loss.options import HeadLossOptions

Rows = Mapping[str, torch.Tensor]
"""Further numbers for each token, each [C], by the name under which the caller gave them."""


class Statistics(NamedTuple):
    """What a term may ask for, one number per token, each [C] in float32 (or float64).

    With logits `z`, label `y` and `p = softmax(z)`:
    """

    logp: torch.Tensor  # log p_y
    lse: torch.Tensor  # log sum_j exp z_j
    max_logp: torch.Tensor  # max_j log p_j; without gradient
    uniform_ce: torch.Tensor | None = None  # -mean_j log p_j
    entropy: torch.Tensor | None = None  # -sum_j p_j log p_j


OPTIONAL = frozenset(Statistics._field_defaults)


class Term(Protocol):
    """One summand of the loss: `weight * loss(statistics, rows)`, per token."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float:
        """0 reports the term and leaves the gradients alone."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields of `Statistics` that `loss` reads."""
        ...

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        """The loss of each token, [C], before `weight`."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """`-log p_y`; with label smoothing as in `torch.nn.functional.cross_entropy`."""

    label_smoothing: float = 0.0
    name: str = "cross_entropy"
    weight: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"uniform_ce"} if self.label_smoothing else ())

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        if not self.label_smoothing:
            return -stats.logp
        assert stats.uniform_ce is not None
        eps = self.label_smoothing
        return eps * stats.uniform_ce - (1 - eps) * stats.logp


@dataclass(frozen=True)
class ZLoss:
    """`logsumexp(z) ** 2`: keeps the logits' scale near zero (PaLM, arXiv:2204.02311)."""

    weight: float
    name: str = "z_loss"
    needs: frozenset[str] = frozenset()

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        return stats.lse.square()


@dataclass(frozen=True)
class Focal:
    """`-(1 - p_y) ** gamma * log p_y` (Lin et al., arXiv:1708.02002)."""

    gamma: float = 2.0
    weight: float = 1.0
    name: str = "focal"
    needs: frozenset[str] = frozenset()

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        # 1 - p without cancellation; at p = 1 a fraction's power has no slope.
        miss = (-torch.expm1(stats.logp)).clamp(min=torch.finfo(stats.logp.dtype).tiny)
        return -(miss**self.gamma) * stats.logp


@dataclass(frozen=True)
class EntropyBonus:
    """`-H(p)`: a positive weight keeps the distribution wide."""

    weight: float
    name: str = "entropy_bonus"
    needs: frozenset[str] = frozenset({"entropy"})

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        assert stats.entropy is not None
        return -stats.entropy


@dataclass(frozen=True)
class SelfWeighted:
    """`-p_y log p_y` with `p_y` as a constant weight: confident tokens count more."""

    weight: float = 1.0
    name: str = "self_weighted"
    needs: frozenset[str] = frozenset()

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        return -stats.logp.detach().exp() * stats.logp


@dataclass(frozen=True)
class PolicyGradient:
    """Clipped policy gradient on the tokens that were sampled.

    With `r = exp(log p_y - old_logp)` and the advantage `A`, per token:

        "ppo"        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)   (arXiv:1707.06347)
        "cispo"      -clip(r, 1 - clip_low, 1 + clip_high) A log p_y, the ratio constant
                     (arXiv:2506.13585)
        "reinforce"  -A log p_y

    GRPO and DAPO are "ppo" with their advantages, bounds and normalizer. With
    `dual_clip` > 1, a token with A < 0 loses at most `-dual_clip * A` (arXiv:1912.09729).

    Rows: `advantages`; `old_logp` (not for "reinforce").
    """

    kind: Literal["ppo", "cispo", "reinforce"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    weight: float = 1.0
    name: str = "policy_gradient"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in ("ppo", "cispo", "reinforce"):
            raise ValueError(f"kind must be ppo, cispo or reinforce, got {self.kind!r}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")

    @property
    def inputs(self) -> frozenset[str]:
        """The rows that `loss` reads."""
        ratio = () if self.kind == "reinforce" else ("old_logp",)
        return frozenset({"advantages", *ratio})

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        advantages = rows["advantages"]
        if self.kind == "reinforce":
            return -advantages * stats.logp
        ratio = torch.exp(stats.logp - rows["old_logp"])
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.kind == "cispo":
            return -clipped.detach() * advantages * stats.logp
        loss = torch.maximum(-ratio * advantages, -clipped * advantages)
        if self.dual_clip is not None:
            bounded = torch.minimum(loss, -self.dual_clip * advantages)
            loss = torch.where(advantages < 0, bounded, loss)
        return loss


@dataclass(frozen=True)
class ReferenceKL:
    """Distance from a reference policy, estimated on the sampled token.

    With `d = ref_logp - log p_y`: "k1" -d, "k2" d^2 / 2, "k3" exp(d) - 1 - d
    (joschu.net/blog/kl-approx.html). Rows: `ref_logp`.
    """

    weight: float
    kind: Literal["k1", "k2", "k3"] = "k3"
    name: str = "reference_kl"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in ("k1", "k2", "k3"):
            raise ValueError(f"kind must be k1, k2 or k3, got {self.kind!r}")

    @property
    def inputs(self) -> frozenset[str]:
        """The rows that `loss` reads."""
        return frozenset({"ref_logp"})

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        d = rows["ref_logp"] - stats.logp
        if self.kind == "k1":
            return -d
        return d.square() / 2 if self.kind == "k2" else torch.expm1(d) - d


class TermValues(NamedTuple):
    """What the terms of one chunk give back."""

    by_row: torch.Tensor  # [C] the weighted sum over terms
    by_term: (
        torch.Tensor
    )  # [number of terms] weighted sums over rows, before the weights
    partials: Statistics | None  # d loss / d statistic, each [C]


def terms_of(options: HeadLossOptions) -> tuple[Term, ...]:
    """The terms that the options ask for. A term that is off is not there at all."""
    terms: list[Term] = [CrossEntropy(options.label_smoothing)]
    if options.z_loss:
        terms.append(ZLoss(options.z_loss))
    return tuple(terms)


def check_terms(terms: Sequence[Term]) -> None:
    """
    Raises:
        ValueError: for no terms, for two of one name, or for a statistic that does not
            exist.
    """
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a head loss needs terms of different names, got {names}")
    for term in terms:
        if unknown := sorted(term.needs - OPTIONAL):
            raise ValueError(
                f"the term {term.name} needs {', '.join(unknown)}; there are "
                f"{', '.join(sorted(OPTIONAL))}"
            )


def evaluate(
    terms: Sequence[Term],
    stats: Statistics,
    rows: Rows,
    row_weight_C: torch.Tensor,
    valid_C: torch.Tensor,
    *,
    with_partials: bool,
) -> TermValues:
    """The terms' values and, if wanted, the partials of the loss by statistic.

    Rows that are not valid count as zero, whatever they hold.
    """
    leaves: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        if with_partials:
            leaves = {
                name: value.detach().requires_grad_(name != "max_logp")
                for name, value in stats._asdict().items()
                if value is not None
            }
            stats = Statistics(**leaves)
        losses_KC = torch.stack([term.loss(stats, rows) for term in terms])
        # By Python numbers: a tensor of them would have to be copied to the GPU.
        by_row_C = torch.stack(
            [t.weight * loss_C for t, loss_C in zip(terms, losses_KC, strict=True)]
        ).sum(dim=0)
        by_row_C = torch.where(valid_C, by_row_C, 0.0)
        loss = (by_row_C * row_weight_C).sum()
    by_term_K = torch.where(valid_C, losses_KC.detach() * row_weight_C, 0.0).sum(dim=1)
    partials = None
    if with_partials:
        wanted = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(
            loss, list(wanted.values()), allow_unused=True, materialize_grads=True
        )
        # Where a masked row holds an infinite number, autograd gives 0 * inf.
        masked = (torch.where(valid_C, grad, 0.0) for grad in grads)
        partials = Statistics(
            **dict(zip(wanted, masked, strict=True)), max_logp=leaves["max_logp"]
        )
    return TermValues(by_row_C.detach(), by_term_K, partials)
