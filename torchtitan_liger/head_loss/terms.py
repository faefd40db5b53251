"""Terms of a head loss: plain torch on a few numbers per token.

A term sees `Statistics` of each token, never the logits. The engine gets each term's
partial derivatives by autograd on those numbers and turns their sum into the gradient of
the logits in one sweep, so any mixture of terms costs one softmax.

A term of your own is a class with a name, a weight and a loss:

    @dataclass(frozen=True)
    class Squared(Term):
        weight: float
        name: str = "squared"

        def loss(self, stats, rows):
            return stats.logp.square()

`C` tokens of a chunk, `K` candidate token ids of each token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from torchtitan_liger.head_loss.options import check_number
from torchtitan_liger.head_loss.sequences import Sequences
from torchtitan_liger.head_loss.statistics import (
    OPTIONAL,
    WITHOUT_GRADIENT,
    Statistics,
)

Rows = Mapping[str, torch.Tensor]
"""Further numbers for each token, [C] or [C, K], by the name under which the caller gave
them."""


class Term:
    """One summand of the loss: `weight * loss(statistics, rows)`, per token."""

    name: str
    weight: float
    """0 reports the term and leaves the gradients alone."""
    jsd_beta: float = 0.5
    """The teacher's share of the mixture; all terms that need `jsd` have the same."""

    @property
    def needs(self) -> frozenset[str]:
        """The optional fields of `Statistics` that `loss` and `metrics` read."""
        return frozenset()

    @property
    def inputs(self) -> frozenset[str]:
        """The row inputs that `loss` and `metrics` read."""
        return frozenset()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` gives, in its order. The engine adds up a metric over tokens; of
        one whose name ends in "/max" or "/min" it keeps the extreme."""
        return ()

    @property
    def slopes(self) -> Mapping[str, float] | None:
        """The partial derivatives of `loss` by `Statistics` where all of them are
        constants; autograd finds them where this is None, some small kernels later.
        A class with another `loss` than its parent's has None, or its own."""
        return None

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        """The loss of each token, [C], before `weight`.

        An optional statistic is None unless it is in `needs`. A chunk's tokens come
        together, other ones in each pass: a loss that looks at other tokens, as at a mean
        over them, is a `SequenceTerm`. It is asked several times, and has to give the same
        each time; it may not change what it reads, and has no parameters to learn.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no loss(stats, rows); with a sequence_loss it is a "
            "SequenceTerm"
        )

    def metrics(self, stats: Statistics, rows: Rows) -> Sequence[torch.Tensor]:
        """Numbers to report of each token, [C] each; without gradient."""
        return ()


class SequenceTerm(Term):
    """A term whose loss of a token depends on the other tokens of its sequence.

    Its gradients wait until all tokens of a sequence have been seen: the engine cuts
    chunks along sequences where their logits fit into the budget, and otherwise computes
    the logits a second time. A chunk counts its sequences from zero: their numbers say
    who belongs together, and nothing else.
    """

    @property
    def sequences_per_group(self) -> int | None:
        """How many neighbouring sequences it has to see together; None for all."""
        return 1

    def sequence_loss(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> torch.Tensor:
        """The loss of each token, [C], before `weight`; instead of `loss`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no sequence_loss(stats, rows, sequences)"
        )

    def sequence_metrics(
        self, stats: Statistics, rows: Rows, sequences: Sequences
    ) -> Sequence[torch.Tensor]:
        """`metrics`, for those that look at the other tokens as well."""
        return self.metrics(stats, rows)


SmoothOver = Literal["all", "others"]


@dataclass(frozen=True)
class CrossEntropy(Term):
    """`-log p_y`; with label smoothing as in `torch.nn.functional.cross_entropy`.

    `smooth_over = "others"` spreads `label_smoothing` over the other token ids instead of
    over all, the label included.
    """

    label_smoothing: float = 0.0
    weight: float = 1.0
    smooth_over: SmoothOver = "all"
    name: str = "cross_entropy"

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        check_number("label_smoothing", smoothing, "in [0, 1)", lambda x: 0 <= x < 1)
        check_choice("smooth_over", self.smooth_over, SmoothOver)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"uniform_ce"} if self.label_smoothing else ())

    @property
    def slopes(self) -> Mapping[str, float] | None:
        if not self.label_smoothing:
            return {"logp": -1.0}
        if self.smooth_over == "others":
            return None
        eps = self.label_smoothing
        return {"logp": eps - 1, "uniform_ce": eps}

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        if not self.label_smoothing:
            return -stats.logp
        assert stats.uniform_ce is not None
        eps, vocab_size = self.label_smoothing, stats.vocab_size
        if self.smooth_over == "others":
            # The mean over the others is (V * mean over all - label) / (V - 1). A
            # vocabulary of one has no others.
            eps *= vocab_size / (vocab_size - 1) if vocab_size > 1 else 0.0
        return eps * stats.uniform_ce - (1 - eps) * stats.logp


@dataclass(frozen=True)
class ZLoss(Term):
    """`logsumexp(z) ** 2`: keeps the logits' scale near zero (PaLM, arXiv:2204.02311)."""

    weight: float
    name: str = "z_loss"

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        return stats.lse.square()


@dataclass(frozen=True)
class Focal(Term):
    """`-(1 - p_y) ** gamma * log p_y` (Lin et al., arXiv:1708.02002)."""

    gamma: float = 2.0
    weight: float = 1.0
    name: str = "focal"

    def __post_init__(self) -> None:
        wanted = "at least 0 and finite"
        check_number("gamma", self.gamma, wanted, lambda x: 0 <= x < math.inf)

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        # 1 - p without cancellation; at p = 1 a fraction's power has no slope.
        miss = (-torch.expm1(stats.logp)).clamp(min=torch.finfo(stats.logp.dtype).tiny)
        return -(miss**self.gamma) * stats.logp


@dataclass(frozen=True)
class EntropyBonus(Term):
    """`-H(p)`: a positive weight keeps the distribution wide."""

    weight: float
    name: str = "entropy_bonus"
    needs = frozenset({"entropy"})
    slopes = MappingProxyType({"entropy": -1.0})

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        assert stats.entropy is not None
        return -stats.entropy


@dataclass(frozen=True)
class Collision(Term):
    """`sum_j p_j ** 2`, the chance that two draws agree; 1 - Gini impurity."""

    weight: float
    name: str = "collision"
    needs = frozenset({"p2"})
    slopes = MappingProxyType({"p2": 1.0})

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        assert stats.p2 is not None
        return stats.p2


@dataclass(frozen=True)
class SelfWeighted(Term):
    """`-p_y log p_y` with `p_y` as a constant weight: confident tokens count more.

    Dynamic fine-tuning (arXiv:2508.05629), Liger-Kernel's `use_token_scaling`.
    """

    weight: float = 1.0
    name: str = "self_weighted"

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        return -stats.logp.detach().exp() * stats.logp


@dataclass(frozen=True)
class Unlikelihood(Term):
    """`-sum_k log(1 - p_k)` over token ids that should not come (arXiv:1908.04319).

    Rows: `candidates`, [C, K] int64 or int32 token ids; a negative one for none, and twice
    counts twice. `1 - p_k` is held above `floor`, where the gradient ends.
    """

    weight: float = 1.0
    floor: float = 1e-5
    name: str = "unlikelihood"
    needs = frozenset({"logp_k"})
    inputs = frozenset({"candidates"})

    def __post_init__(self) -> None:
        # At 0, a certain candidate has an infinite slope.
        check_number("floor", self.floor, "in (0, 1)", lambda x: 0 < x < 1)

    def loss(self, stats: Statistics, rows: Rows) -> torch.Tensor:
        assert stats.logp_k is not None
        present = rows["candidates"] >= 0
        # log p of what is not there is no logarithm of a probability.
        logp = torch.where(present, stats.logp_k, -torch.inf)
        logp = logp.clamp(max=math.log1p(-self.floor))
        return -torch.where(present, _log_miss(logp), 0.0).sum(dim=-1)


def _log_miss(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - p): both forms lose digits, of value or slope, where the other does not."""
    likely = logp > -math.log(2)
    of_likely = (-torch.expm1(torch.where(likely, logp, -1.0))).log()
    of_others = torch.log1p(-torch.where(likely, -1.0, logp).exp())
    return torch.where(likely, of_likely, of_others)


def check_choice(name: str, value: str, choices: Any) -> None:
    """ValueError for a value that is not one of the Literal `choices`."""
    if value not in get_args(choices):
        wanted = ", ".join(get_args(choices))
        raise ValueError(f"{name} must be one of {wanted}, got {value!r}")


def as_terms(terms: Sequence[Term]) -> tuple[Term, ...]:
    """As a tuple; ValueError for what is no sequence."""
    if isinstance(terms, Term) or not isinstance(terms, Sequence):
        like = repr(terms) if isinstance(terms, Term) else "CrossEntropy()"
        raise ValueError(f"terms must be a sequence, such as [{like}], got {terms!r}")
    return tuple(terms)


def plain_terms(label_smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Term, ...]:
    """Cross entropy, and the z-loss of this weight unless it is 0."""
    cross_entropy = CrossEntropy(label_smoothing)
    return (cross_entropy, ZLoss(z_loss)) if z_loss else (cross_entropy,)


def plain_of(terms: tuple[Term, ...]) -> tuple[float, float] | None:
    """`(label_smoothing, z_loss)` if `terms` are the `plain_terms` of them, else None."""
    match terms:
        case (CrossEntropy(label_smoothing=smoothing),):
            z_loss = 0.0
        case (CrossEntropy(label_smoothing=smoothing), ZLoss(weight=z_loss)):
            pass
        case _:
            return None
    plain = smoothing, z_loss
    return plain if terms == plain_terms(*plain) else None


def slopes_of(term: Term) -> Mapping[str, float] | None:
    """A term's slopes, unless they are of a parent whose loss it does not have."""
    for kind in type(term).__mro__:
        if "slopes" in vars(kind):
            return term.slopes
        if "loss" in vars(kind) or "sequence_loss" in vars(kind):
            break
    return None


def needs_of(terms: Sequence[Term]) -> frozenset[str]:
    """The optional statistics that any of the terms reads."""
    return frozenset[str]().union(*(term.needs for term in terms))


def jsd_beta_of(terms: Sequence[Term]) -> float:
    """That of the terms that need a JSD."""
    return next((t.jsd_beta for t in terms if "jsd" in t.needs), Term.jsd_beta)


def check_terms(terms: Sequence[Term]) -> None:
    """
    Raises:
        ValueError: for no terms, for what is no term, for attributes that are not what
            `Term` says, for two of one name, and for two that need one thing in two ways.
    """
    for term in terms:
        if not isinstance(term, Term):
            raise ValueError(
                f"a head loss is a sum of terms such as CrossEntropy(), got {term!r}"
            )
        if not (isinstance(term.needs, Set) and isinstance(term.inputs, Set)):
            raise ValueError(f"`needs` and `inputs` of {term} must be sets of names")
        if isinstance(term.metric_names, str):
            raise ValueError(f"`metric_names` of {term} must be a sequence of names")
        name = getattr(term, "name", None)
        if not (isinstance(name, str) and name):
            raise ValueError(f'a term needs a name (name: str = "..."), got {term!r}')
    names = [term.name for term in terms]
    if not names:
        raise ValueError("a head loss needs at least one term")
    if len(set(names)) < len(names):
        raise ValueError(f"a head loss needs terms of different names, got {names}")
    for term in terms:
        if unknown := sorted(term.needs - OPTIONAL):
            raise ValueError(
                f"the term {term.name} needs {', '.join(unknown)}; there are "
                f"{', '.join(sorted(OPTIONAL))}"
            )
        weight = getattr(term, "weight", None)
        check_number(
            f"the weight of {term.name}", weight, "a finite int or float", math.isfinite
        )
        if "logp_k" in term.needs and "candidates" not in term.inputs:
            raise ValueError(
                f"the term {term.name} needs logp_k, which is of the row input candidates: "
                "that has to be in its `inputs`"
            )
        # One number for each token each: not those of candidates.
        differentiable = {"logp", "lse"} | term.needs - WITHOUT_GRADIENT - {"logp_k"}
        if unknown := sorted(set(slopes_of(term) or ()) - differentiable):
            raise ValueError(
                f"the term {term.name} has slopes by {', '.join(unknown)}, which is not in "
                "its `needs`, has no gradient, or is not one number for each token"
            )
    metrics = [f"{term.name}/{name}" for term in terms for name in term.metric_names]
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"a head loss needs metrics of different names, got {metrics}")
    betas = {term.jsd_beta for term in terms if "jsd" in term.needs}
    if len(betas) > 1:
        raise ValueError(f"a head loss has one beta for its JSD, got {sorted(betas)}")
