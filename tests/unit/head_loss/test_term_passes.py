"""Which passes over the logits a mixture of terms takes."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import Problem
from tests.unit.head_loss.term_cases import SquaredJSD
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    EntropyBonus,
    HeadLoss,
    Teacher,
    ZLoss,
    sweeps,
)
from torchtitan_liger.head_loss.passes import Passes


@pytest.mark.parametrize(
    ("terms", "trips"),
    [
        ([CrossEntropy()], 1),
        ([CrossEntropy(0.1), Distillation()], 1),
        ([Distillation("reverse_kl")], 1),
        ([Distillation("soft_cross_entropy")], 1),
        ([Distillation("jsd")], 2),
        ([CrossEntropy(), EntropyBonus(0.0)], 2),
        ([CrossEntropy(), ZLoss(0.0)], 1),
        ([CrossEntropy(), ZLoss(0.1)], 2),
    ],
    ids=str,
)
def test_what_is_linear_in_few_statistics_takes_one_trip(monkeypatch, terms, trips):
    taken = []

    def seen(name):
        step = getattr(Passes, name)
        monkeypatch.setattr(Passes, name, lambda *a: (taken.append(name), step(*a))[1])

    for name in ("gradients_in_one_trip", "start", "gradients"):
        seen(name)
    problem = Problem(T=37, D=16, V=101)
    teacher = None
    if any(isinstance(term, Distillation) for term in terms):
        teacher = Teacher(logits=torch.randn(37, 101).double())
    problem.run(lambda *args: HeadLoss(terms)(*args, teacher=teacher).loss)
    one, two = ["gradients_in_one_trip"], ["start", "gradients"]
    assert taken == (one if trips == 1 else two)


@pytest.mark.parametrize(
    ("terms", "with_gradient"),
    [
        ([Distillation("jsd")], True),
        ([CrossEntropy(), EntropyBonus(0.1), Distillation("jsd", 0.5, 0.0)], True),
        ([SquaredJSD()], False),
        ([SquaredJSD(), Distillation("jsd")], False),
    ],
    ids=str,
)
def test_a_mixture_comes_with_the_gradient_unless_the_gradient_needs_it(
    monkeypatch, terms, with_gradient
):
    taken = []
    sweep = sweeps.mixture_gradient_sweep
    monkeypatch.setattr(
        sweeps,
        "mixture_gradient_sweep",
        lambda *a, **k: (taken.append(1), sweep(*a, **k))[1],
    )
    problem = Problem(T=37, D=16, V=101)
    teacher = Teacher(logits=torch.randn(37, 101).double())
    head = HeadLoss(terms)
    problem.run(lambda *args: head(*args, teacher=teacher).loss)
    assert bool(taken) == with_gradient
    taken.clear()
    with torch.no_grad():
        head(problem.hidden, problem.weight, problem.labels, teacher=teacher)
    assert not taken
