"""Ignored tokens that are not dropped: as on a GPU, where nobody has counted the labels."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import Problem
from torchtitan_liger.head_loss import HeadLoss, PolicyGradient


@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_are_of_tokens_with_a_label_alone(sign, nothing_dropped):
    nothing_dropped()
    problem = Problem(T=37, D=16, V=101)
    advantages = sign * torch.linspace(1, 2, 37).double()
    metrics = HeadLoss([PolicyGradient()])(
        problem.hidden,
        problem.weight,
        problem.labels,
        advantages=advantages,
        old_logp=torch.full((37,), -5.0),
    ).metrics
    valid = problem.labels != -100
    assert metrics["policy_gradient/advantage/max"] == advantages[valid].max()
    assert metrics["policy_gradient/advantage/min"] == advantages[valid].min()


def test_what_an_ignored_token_weighs_is_not_read(nothing_dropped):
    problem = Problem(T=37, D=16, V=101)
    weights = torch.linspace(0.1, 2, 37).double()
    truth = problem.run(lambda *args: HeadLoss()(*args, token_weights=weights).loss)
    nothing_dropped()
    weights = weights.masked_fill(problem.labels == -100, torch.nan)
    ours = problem.run(lambda *args: HeadLoss()(*args, token_weights=weights).loss)
    assert max(ours.errors(truth).values()) < 1e-12


@pytest.mark.parametrize("label", [517, -5])
def test_an_unchecked_label_makes_the_loss_nan(label, nothing_dropped):
    nothing_dropped()
    problem = Problem()
    problem.labels[11] = label
    out = HeadLoss()(problem.hidden, problem.weight, problem.labels, check_labels=False)
    assert out.loss.isnan()
