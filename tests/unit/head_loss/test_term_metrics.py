"""What a call with terms reports."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    CrossEntropy,
    EntropyBonus,
    HeadLoss,
    PolicyGradient,
    ZLoss,
)


def test_terms_and_metrics_are_what_full_logits_give():
    problem = Problem(T=200, D=16, V=11, scale=3.0)
    z = (problem.hidden @ problem.weight.T)[problem.labels != -100]
    y = problem.labels[problem.labels != -100]
    head = HeadLoss([CrossEntropy(), EntropyBonus(0.0)])
    hidden = problem.hidden.clone().requires_grad_()
    out = head(hidden, problem.weight, problem.labels, normalizer=len(y))
    entropy = torch.distributions.Categorical(logits=z).entropy().mean()
    expected = {
        "nll": F.cross_entropy(z, y),
        "accuracy": (z.argmax(1) == y).double().mean(),
        "max_prob": z.softmax(1).amax(1).mean(),
        "entropy": entropy,
    }
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-12), name
    assert out.terms["entropy_bonus"].item() == pytest.approx(-entropy.item())
    assert out.loss.item() == pytest.approx(F.cross_entropy(z, y).item())
    plain = HeadLoss()(problem.hidden, problem.weight, problem.labels)
    assert plain.metrics.keys() == {"nll", "accuracy", "max_prob"}


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_nll_has_no_smoothing_and_no_token_weights(impl):
    problem = Problem(T=50, D=16, V=11)
    args = problem.hidden, problem.weight, problem.labels
    weights = torch.rand(50, dtype=torch.float64)
    z = problem.hidden @ problem.weight.T
    nll = F.cross_entropy(z, problem.labels, reduction="sum")
    out = HeadLoss([CrossEntropy(), ZLoss(0.1)], impl=impl)(
        *args, token_weights=weights
    )
    assert out.metrics["nll"].item() == pytest.approx(nll.item(), rel=1e-12)
    smoothed = HeadLoss([CrossEntropy(0.1)], impl=impl)(*args).metrics
    if impl == "chunked":
        assert smoothed["nll"].item() == pytest.approx(nll.item(), rel=1e-12)
    else:
        assert "nll" not in smoothed


def test_a_label_is_right_where_no_logit_is_larger():
    # Of these logits no logarithm of a softmax differs.
    weight = torch.tensor([[2e-9], [1e-9], [2e-9], [-1e-9]])
    labels = torch.tensor([0, 1, 2, 3])
    out = HeadLoss()(torch.ones(4, 1), weight, labels)
    assert out.metrics["accuracy"].item() == 2


def test_a_term_of_weight_0_reports_and_leaves_the_gradients_alone():
    problem = Problem()
    head = HeadLoss([CrossEntropy(), ZLoss(0.0)])
    alone = problem.run(lambda *args: HeadLoss()(*args).loss)
    both = problem.run(lambda *args: head(*args).loss)
    assert torch.equal(both.d_weight, alone.d_weight)
    out = head(problem.hidden, problem.weight, problem.labels)
    assert out.terms["z_loss"] > 0


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_without_any_label_sums_are_zero_and_extremes_infinite(num_tokens):
    head = HeadLoss([CrossEntropy(), PolicyGradient(), ZLoss(0.1)])
    hidden = torch.full((num_tokens, 8), torch.nan, requires_grad=True)
    weight = torch.ones(11, 8, requires_grad=True)
    labels = torch.full((num_tokens,), -100)
    nan = torch.full((num_tokens,), torch.nan)
    out = head(hidden, weight, labels, normalizer=0, advantages=nan, old_logp=nan)
    out.loss.backward()
    assert out.loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert all(value == 0 for value in out.terms.values())
    for name, value in out.metrics.items():
        end = {"max": -torch.inf, "min": torch.inf}.get(name.rpartition("/")[2], 0.0)
        assert value == end, name


def test_what_a_policy_gradient_reports_are_means_over_tokens():
    problem = Problem(T=37, D=16, V=101)
    args = problem.hidden, problem.weight, problem.labels
    valid = problem.labels != -100
    logp = -F.cross_entropy(args[0] @ args[1].T, args[2], reduction="none")
    gap = torch.linspace(-0.5, 0.5, 37).double()
    rows = {"advantages": gap, "old_logp": logp - gap}
    metrics = HeadLoss([PolicyGradient("ppo", 0.1, 0.4)])(
        *args, normalizer=valid.sum(), **rows
    ).metrics
    ratio = gap.exp()
    expected = {
        "new_logp": logp,
        "old_logp": logp - gap,
        "ratio": ratio,
        "ratio_squared": ratio**2,
        "kl_new_old": ratio - 1 - gap,
        "clip_fraction": ((ratio < 0.9) | (ratio > 1.4)).double(),
        "advantage": gap,
    }
    for name, values in expected.items():
        mean = values[valid].mean().item()
        found = metrics[f"policy_gradient/{name}"].item()
        assert found == pytest.approx(mean, rel=1e-10), name


def test_terms_and_metrics_have_no_gradient():
    problem = Problem(T=9, D=8, V=21)
    args = problem.hidden.requires_grad_(), problem.weight, problem.labels
    out = HeadLoss([CrossEntropy(), ZLoss(0.1)])(*args)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out.terms.values())
    assert not any(x.requires_grad for x in out.metrics.values())
