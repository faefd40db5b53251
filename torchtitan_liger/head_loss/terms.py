"""Losses as plain torch on per-row statistics of the softmax.

A term sees a few numbers per token, never the logits. The engine gets each term's partial
derivatives by autograd on those numbers and turns their sum into the gradient of the
logits in one sweep, so any mixture of terms costs one softmax.

`C` tokens of a chunk, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from torchtitan_liger.head_loss.options import HeadLossOptions


class Statistics(NamedTuple):
    """What a term may ask for, one number per token, each [C] in float32 (or float64).

    With logits `z`, label `y` and `p = softmax(z)`:
    """

    logp: torch.Tensor  # log p_y
    lse: torch.Tensor  # log sum_j exp z_j
    uniform_ce: torch.Tensor | None = None  # -mean_j log p_j


class Term(Protocol):
    """One summand of the loss: `weight * loss(statistics)`, per token."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields of `Statistics` that `loss` reads."""
        ...

    def loss(self, stats: Statistics) -> torch.Tensor:
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

    def loss(self, stats: Statistics) -> torch.Tensor:
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

    def loss(self, stats: Statistics) -> torch.Tensor:
        return stats.lse.square()


class TermValues(NamedTuple):
    """What the terms of one chunk give back."""

    loss: torch.Tensor  # [] the weighted sum over terms and rows
    by_term: torch.Tensor  # [number of terms] sums over rows, before each term's weight
    partials: Statistics | None  # d loss / d statistic, each [C]


def terms_of(options: HeadLossOptions) -> tuple[Term, ...]:
    """The terms that the options ask for. A term that is off is not there at all."""
    terms: list[Term] = [CrossEntropy(options.label_smoothing)]
    if options.z_loss:
        terms.append(ZLoss(options.z_loss))
    return tuple(terms)


def evaluate(
    terms: Sequence[Term],
    stats: Statistics,
    row_weight_C: torch.Tensor,
    *,
    with_partials: bool,
) -> TermValues:
    """The terms' sums over rows and, if wanted, their partials by statistic."""
    leaves: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        if with_partials:
            leaves = {
                name: value.detach().requires_grad_()
                for name, value in stats._asdict().items()
                if value is not None
            }
            stats = Statistics(**leaves)
        by_term = torch.stack(
            [(term.loss(stats) * row_weight_C).sum() for term in terms]
        )
        # By Python numbers: a tensor of them would have to be copied to the GPU.
        loss = torch.stack(
            [term.weight * value for term, value in zip(terms, by_term, strict=True)]
        ).sum()
    partials = None
    if with_partials:
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        partials = Statistics(**dict(zip(leaves, grads, strict=True)))
    return TermValues(loss.detach(), by_term.detach(), partials)
