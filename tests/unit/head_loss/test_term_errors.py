"""What terms, and calls with terms, are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    Focal,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    Preference,
    ReferenceKL,
    Teacher,
    Term,
    Unlikelihood,
    UnpairedPreference,
    ZLoss,
)


class Unknown(Term):
    name, weight, needs = "unknown", 1.0, frozenset({"rank"})


def own(**attributes):
    return type("Own", (Term,), {"name": "own", "weight": 1.0, **attributes})()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadLoss([]), "at least one term"),
        (lambda: HeadLoss([ZLoss(1.0), ZLoss(2.0)]), "terms of different names"),
        (lambda: HeadLoss([Unknown()]), "needs rank; there"),
        (
            lambda: HeadLoss([ZLoss(float("nan"))]),
            "z_loss must be a finite int or float",
        ),
        (
            lambda: HeadLoss([ZLoss(torch.ones(()))]),
            "z_loss must be a finite int or float",
        ),
        (lambda: HeadLoss([own(needs={"logp_k"})]), "row input candidates"),
        (lambda: HeadLoss([own(slopes={"entropy": 1.0})]), "slopes by entropy"),
        (lambda: HeadLoss([own(slopes={"max_logp": 1.0})]), "slopes by max_logp"),
        (
            lambda: HeadLoss(
                [own(needs={"teacher_entropy"}, slopes={"teacher_entropy": 1.0})]
            ),
            "slopes by teacher_entropy",
        ),
        (
            lambda: HeadLoss(
                [
                    own(
                        needs={"logp_k"},
                        inputs={"candidates"},
                        slopes={"logp_k": 1.0},
                    )
                ]
            ),
            "slopes by logp_k",
        ),
        (lambda: HeadLoss([own(needs=("entropy",))]), "must be sets of names"),
        (lambda: HeadLoss([own(weight="1")]), "must be a finite int or float, got '1'"),
        (
            lambda: HeadLoss([own(weight=None)]),
            "must be a finite int or float, got None",
        ),
        (
            lambda: HeadLoss([own(weight=True)]),
            "must be a finite int or float, got True",
        ),
        (lambda: HeadLoss([own(name="")]), "a term needs a name"),
        (lambda: HeadLoss([own(name=3)]), "a term needs a name"),
        (lambda: HeadLoss([own(needs="entropy")]), "must be sets of names"),
        (lambda: HeadLoss([own(inputs="margin")]), "must be sets of names"),
        (
            lambda: HeadLoss([own(inputs={"labels"})]),
            "reads the input labels, which is",
        ),
        (lambda: HeadLoss([own(metric_names=("a", "a"))]), "metrics of different"),
        (lambda: HeadLoss([own(metric_names="acc")]), "must be a sequence of names"),
        (
            lambda: HeadLoss(
                [
                    own(metric_names=("a/b",)),
                    own(name="own/a", metric_names=("b",)),
                ]
            ),
            "metrics of different names",
        ),
        (lambda: HeadLoss([type("Own", (Term,), {"weight": 1.0})()]), "needs a name"),
        (lambda: Focal(float("nan")), "at least 0 and finite, got nan"),
        (lambda: Unlikelihood(floor=1.0), r"in \(0, 1\), got 1.0"),
        (lambda: Unlikelihood(floor=0.0), r"in \(0, 1\), got 0.0"),
        (lambda: PolicyGradient(dual_clip=float("nan")), "above 1, got nan"),
        (lambda: PolicyGradient(importance_cap=float("nan")), "positive, got nan"),
        (lambda: Preference(beta=float("nan")), "positive, got nan"),
        (lambda: HeadLoss(ZLoss(1.0)), r"such as \[ZLoss\(weight=1.0"),
        (lambda: HeadLoss(None), r"such as \[CrossEntropy\(\)\], got None"),
        (lambda: HeadLoss(HeadLossOptions()), "sequence, .* got HeadLossOptions"),
        (lambda: HeadLoss([CrossEntropy]), "such as CrossEntropy\\(\\), got <class"),
        (
            lambda: HeadLoss([ZLoss(1.0)], impl="reference"),
            r"only, got \(ZLoss\(weight",
        ),
        (
            lambda: HeadLoss([CrossEntropy(), ZLoss(0.0)], impl="reference"),
            "and, after it, ZLoss",
        ),
        (
            lambda: HeadLoss(
                [CrossEntropy(0.1, smooth_over="others")], impl="reference"
            ),
            "only, got .*others",
        ),
        (lambda: PolicyGradient("grpo"), "ppo, cispo, reinforce, got 'grpo'"),
        (lambda: PolicyGradient(clip_low=1.5), "clip_low must be in"),
        (lambda: PolicyGradient(importance_cap=0.0), "positive, got 0.0"),
        (lambda: Distillation("kl"), "got 'kl'"),
        (lambda: Distillation("jsd", beta=1.5), r"in \[0, 1\], got 1.5"),
        (
            lambda: HeadLoss([Distillation("jsd"), Distillation("jsd", 0.1, name="b")]),
            "one beta for its JSD",
        ),
        (Teacher, "either logits, or hidden and weight"),
        (lambda: Teacher(logits=[1.0]), "teacher's logits must be a tensor"),
        (
            lambda: HeadLoss([CrossEntropy(weight=torch.tensor(1.0))]),
            r"finite int or float, got tensor\(1",
        ),
        (
            lambda: Teacher(logits=torch.ones(1), temperature=0.0),
            "positive int or float, got 0.0",
        ),
        (
            lambda: Teacher(logits=torch.ones(1), temperature=torch.tensor(2.0)),
            "positive int or float, got tensor",
        ),
        (
            lambda: Teacher(logits=torch.ones(1), logit_softcap=True),
            "positive int or float, got True",
        ),
        (lambda: CrossEntropy(1.0), r"in \[0, 1\), got 1.0"),
        (lambda: Focal("2"), "at least 0 and finite, got '2'"),
        (lambda: CrossEntropy(torch.tensor(0.1)), r"in \[0, 1\), got tensor"),
        (lambda: Focal(-1.0), "at least 0 and finite, got -1.0"),
        (lambda: Focal(float("inf")), "and finite, got inf"),
        (lambda: Preference("kto"), "got 'kto'"),
        (lambda: Preference("ipo", beta=0.0), "beta must be .*got 0"),
        (lambda: PolicyGradient(dual_clip=1.0), "above 1, got 1"),
        (lambda: PolicyGradient(clip_high=-0.1), "clip_high must be"),
        (lambda: UnpairedPreference(0.0), "beta must be .*got 0.0"),
        (lambda: UnpairedPreference(desirable_weight=-1.0), "desirable_.*got -1.0"),
        (lambda: Preference("simpo", beta=float("inf")), "beta must be .*got inf"),
        (lambda: Preference("simpo", gamma=float("nan")), "gamma must be .*got nan"),
        (lambda: PolicyGradient(dual_clip=0.5), "above 1, got 0.5"),
        (lambda: HeadLoss(options={"temperature": 2}), "must be HeadLossOptions, got"),
        (
            lambda: PolicyGradient("cispo", dual_clip=3.0),
            '"ppo" only, got kind .cispo.',
        ),
        (lambda: ReferenceKL(1.0, "k4"), "got 'k4'"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_row_inputs_must_be_like_the_labels():
    problem = Problem()
    head = HeadLoss([PolicyGradient("reinforce")])
    call = (problem.hidden, problem.weight, problem.labels)
    with pytest.raises(ValueError, match=r"advantages must be like labels, \(257,\)"):
        head(*call, advantages=torch.ones(3))
    with pytest.raises(ValueError, match="advantages is not given"):
        head(*call)
    with pytest.raises(
        ValueError,
        match="token_weight is read by none of the terms; they read no inputs",
    ):
        HeadLoss()(*call, token_weight=torch.ones(257))
    head = HeadLoss([Unlikelihood()])
    with pytest.raises(ValueError, match=r"like labels, \(257, 'K'\).* got \(257,\)"):
        head(*call, candidates=problem.labels)
    head = HeadLoss([Distillation()])
    with pytest.raises(ValueError, match="distillation need teacher"):
        head(*call)
    with pytest.raises(
        ValueError, match="must be a Teacher, got <class 'torch.Tensor'>"
    ):
        head(*call, teacher=torch.ones(257, 517))
    with pytest.raises(ValueError, match="no term that learns from it"):
        HeadLoss()(*call, teacher=Teacher(logits=torch.ones(257, 517)))
    with pytest.raises(ValueError, match=r"must be \(257, 517\), got \(257, 5\)"):
        head(*call, teacher=Teacher(logits=torch.ones(257, 5)))
    with pytest.raises(ValueError, match="teacher must be float64, .*int64"):
        head(*call, teacher=Teacher(logits=torch.ones(257, 517).long()))


def test_a_candidate_beyond_the_vocabulary_is_an_error_or_makes_the_loss_nan():
    problem = Problem()
    head = HeadLoss([Unlikelihood()])
    call = (problem.hidden, problem.weight, problem.labels)
    candidates = torch.zeros(problem.T, 2, dtype=torch.long)
    candidates[problem.labels == -100] = 10**9  # what is ignored may hold anything
    assert head(*call, candidates=candidates).loss.isfinite()
    candidates[int((problem.labels != -100).nonzero()[0]), 1] = problem.V
    with pytest.raises(ValueError, match="must be below 517, .* got 517"):
        head(*call, candidates=candidates)
    assert head(*call, candidates=candidates, check_labels=False).loss.isnan()


@dataclass(frozen=True)
class Reads(Term):
    """A term that reads what it has not asked for."""

    read: Callable[..., torch.Tensor]
    read_metric: Callable[..., torch.Tensor]
    weight: float
    name: str = "mine"
    metric_names = ("mine/metric",)

    def loss(self, stats, rows):
        return self.read(stats, rows)

    def metrics(self, stats, rows):
        return (self.read_metric(stats, rows),)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(
    "read",
    [
        lambda stats, rows: -stats.entropy,
        lambda stats, rows: stats.logp - rows["margin"],
        lambda stats, rows: stats.perplexity,
    ],
    ids=["statistic", "row input", "no statistic"],
)
@pytest.mark.parametrize("place", ["loss", "metric"])
def test_a_term_that_reads_what_is_not_there_is_told_what_it_may_read(
    read, weight, place
):
    problem = Problem(T=5, D=16, V=101, ignored=0)
    reads = [read, lambda stats, rows: stats.logp]
    term = Reads(*(reads if place == "loss" else reversed(reads)), weight)
    with pytest.raises(
        ValueError, match=r"term mine failed with .* `needs` \(none\), .* \(none\)"
    ):
        HeadLoss([CrossEntropy(), term])(problem.hidden, problem.weight, problem.labels)


@dataclass(frozen=True)
class Returns(Term):
    """A term that gives tensors of a wrong shape."""

    make: Callable[[torch.Tensor], torch.Tensor]
    weight: float = 1.0
    name: str = "mine"

    def loss(self, stats, rows):
        return self.make(stats.logp)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda x: x[:, None], r"\[5, 1\]"),
        (lambda x: x.sum(), r"\[\]"),
        (lambda x: 1.0, "1.0"),
        (lambda x: None, "None"),
    ],
)
def test_a_term_gives_one_loss_for_each_token(make, shape):
    problem = Problem(T=5, D=16, V=101, ignored=0)
    hint = "`needs`" if shape == "None" else "SequenceTerm"
    with pytest.raises(ValueError, match=rf"mine must .*\[5\], got {shape}.*{hint}"):
        HeadLoss([Returns(make)])(problem.hidden, problem.weight, problem.labels)


class ReadsMargin(Reads):
    inputs = frozenset({"margin"})


CHANGES = {
    "logp": lambda s, r: -s.logp.clamp_(min=-0.1),
    "margin": lambda s, r: -s.logp * r["margin"].mul_(2.0),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("place", ["loss", "metric"])
def test_a_term_may_not_change_what_others_read(place, weight, changed):
    problem = Problem(T=5, D=16, V=101, ignored=0)
    reads = [CHANGES[changed], lambda s, r: s.logp]
    term = ReadsMargin(*(reads if place == "loss" else reversed(reads)), weight)
    args = problem.hidden, problem.weight, problem.labels
    with torch.no_grad(), pytest.raises(ValueError, match=f"mine changes {changed} in"):
        HeadLoss([CrossEntropy(), term])(*args, margin=torch.ones(5))


def test_a_term_may_not_change_what_its_gradient_needs():
    problem = Problem(T=5, D=16, V=101, ignored=0)
    term = Returns(lambda logp: logp.exp().add_(1.0))
    weight = problem.weight.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="changed in place what its gradient needs"):
        HeadLoss([term])(problem.hidden, weight, problem.labels)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_parameter_of_a_term_would_have_no_gradient(weight):
    problem = Problem(T=5, D=16, V=101, ignored=0)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    term = Returns(lambda logp: -factor * logp, weight)
    with pytest.raises(
        ValueError, match="mine reads a tensor that requires a gradient"
    ):
        HeadLoss([CrossEntropy(), term])(problem.hidden, problem.weight, problem.labels)


@pytest.mark.parametrize("name", ["terms", "options", "impl"])
def test_a_head_does_not_change(name):
    """It would be another one in a graph than outside."""
    with pytest.raises(
        AttributeError, match=f"keeps its {name}: make another HeadLoss"
    ):
        setattr(HeadLoss(), name, None)


@pytest.mark.parametrize(
    "metric",
    [lambda x: x[:, None], lambda x: x.sum(), lambda x: 1.0, lambda x: [x, x]],
)
def test_a_term_gives_one_metric_for_each_name_and_token(metric):
    problem = Problem(T=5, D=16, V=101, ignored=0)
    term = Reads(lambda s, _: s.logp, lambda s, _: metric(s.logp), 1.0)
    with pytest.raises(ValueError, match=r"mine must give each of its 1 .*\[5\], got"):
        HeadLoss([term])(problem.hidden, problem.weight, problem.labels)


def test_what_is_no_tensor_of_token_ids_is_an_error():
    problem = Problem(T=5, D=16, V=101, ignored=0)
    args = problem.hidden, problem.weight, problem.labels
    with pytest.raises(
        ValueError, match=r"candidates must be int64 .* got torch.float"
    ):
        HeadLoss([Unlikelihood()])(*args, candidates=torch.zeros(5, 2))
    for advantages, got in ((1.0, "float"), (torch.full((5,), 1j), "complex64")):
        with pytest.raises(ValueError, match=f"advantages must be a real .*{got}"):
            HeadLoss([PolicyGradient("reinforce")])(*args, advantages=advantages)


def test_a_term_with_a_weight_has_a_gradient():
    problem = Problem(T=5, D=16, V=101, ignored=0)
    args = problem.hidden.requires_grad_(), problem.weight, problem.labels
    read = (lambda s, _: -s.max_logp, lambda s, _: s.logp)
    HeadLoss([CrossEntropy(), Reads(*read, 0.0)])(*args)
    with pytest.raises(ValueError, match="mine has a weight of 0.5, but no .*max_logp"):
        HeadLoss([CrossEntropy(), Reads(*read, 0.5)])(*args)
