"""Every term, and a mixture of them, against full logits and autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import Problem, relative_error
from torchtitan_liger.head_loss import (
    CrossEntropy,
    EntropyBonus,
    Focal,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    ReferenceKL,
    SelfWeighted,
    ZLoss,
    engine,
    linear_cross_entropy,
)


@dataclass(frozen=True)
class Squared:
    """A term as a user writes it."""

    weight: float
    name: str = "squared"
    needs: frozenset[str] = frozenset({"entropy", "uniform_ce"})

    def loss(self, stats, rows):
        return stats.logp.square() + stats.entropy * stats.uniform_ce


# Each term with its definition on full logits: f(z, logp, y, rows) per token.
TERMS = {
    "cross entropy": (
        CrossEntropy(),
        lambda z, lp, y, r: F.cross_entropy(z, y, reduction="none"),
    ),
    "smoothed": (
        CrossEntropy(0.1),
        lambda z, lp, y, r: F.cross_entropy(
            z, y, label_smoothing=0.1, reduction="none"
        ),
    ),
    "z-loss": (ZLoss(0.3), lambda z, lp, y, r: 0.3 * z.logsumexp(1) ** 2),
    "focal": (Focal(2.0), lambda z, lp, y, r: (1 - lp.exp()) ** 2 * -lp),
    "focal, half": (
        Focal(0.5, 0.7),
        lambda z, lp, y, r: 0.7 * (1 - lp.exp()) ** 0.5 * -lp,
    ),
    "entropy": (
        EntropyBonus(0.2),
        lambda z, lp, y, r: -0.2 * torch.distributions.Categorical(logits=z).entropy(),
    ),
    "self-weighted": (SelfWeighted(), lambda z, lp, y, r: -lp.exp().detach() * lp),
    "ppo": (
        PolicyGradient("ppo", 0.2, 0.28),
        lambda z, lp, y, r: (
            -torch.minimum(
                (lp - r["old_logp"]).exp() * r["advantages"],
                (lp - r["old_logp"]).exp().clamp(0.8, 1.28) * r["advantages"],
            )
        ),
    ),
    "dual clip": (
        PolicyGradient("ppo", 0.2, 0.2, dual_clip=3.0),
        lambda z, lp, y, r: dual_clip(lp, r),
    ),
    "cispo": (
        PolicyGradient("cispo"),
        lambda z, lp, y, r: (
            -(lp - r["old_logp"]).exp().clamp(0.8, 1.2).detach() * r["advantages"] * lp
        ),
    ),
    "reinforce": (
        PolicyGradient("reinforce"),
        lambda z, lp, y, r: -r["advantages"] * lp,
    ),
    "k1": (ReferenceKL(0.1, "k1"), lambda z, lp, y, r: 0.1 * (lp - r["ref_logp"])),
    "k2": (
        ReferenceKL(0.1, "k2"),
        lambda z, lp, y, r: 0.05 * (lp - r["ref_logp"]) ** 2,
    ),
    "k3": (
        ReferenceKL(0.1),
        lambda z, lp, y, r: (
            0.1 * ((r["ref_logp"] - lp).exp() - 1 - (r["ref_logp"] - lp))
        ),
    ),
    "a user's": (
        Squared(0.5),
        lambda z, lp, y, r: (
            0.5
            * (
                lp**2
                + torch.distributions.Categorical(logits=z).entropy()
                * -z.log_softmax(1).mean(1)
            )
        ),
    ),
}
MIXTURE = ("smoothed", "z-loss", "focal", "entropy", "ppo", "k3", "a user's")


def dual_clip(lp, r):
    ratio = (lp - r["old_logp"]).exp()
    a = r["advantages"]
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return torch.where(a < 0, torch.minimum(loss, -3.0 * a), loss)


@pytest.fixture(params=[11, 10**6], ids="{}_tokens_per_chunk".format)
def chunks(request, monkeypatch):
    plan = engine.ChunkPlan(request.param, 0, 0, 0)
    monkeypatch.setattr(engine, "plan_chunks", lambda *_, **__: plan)


def row_inputs(problem: Problem) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    logp = (problem.hidden @ problem.weight.T).log_softmax(1)
    logp = logp.gather(1, problem.labels.clamp(min=0)[:, None]).squeeze(1)
    noise = torch.randn(3, problem.T, generator=g, dtype=torch.float64)
    rows = {
        "advantages": noise[0],
        "old_logp": logp + 0.5 * noise[1],
        "ref_logp": logp + 0.5 * noise[2],
    }
    for values in rows.values():  # what is not used may hold anything
        values[problem.labels == -100] = torch.nan
    return rows


def truth_of(names, problem, rows, options):
    def loss_of(hidden, weight, labels):
        z = hidden @ weight.T
        if options.logit_softcap:
            z = options.logit_softcap * torch.tanh(z / options.logit_softcap)
        z = z / options.temperature
        valid = labels != -100
        z, y = z[valid], labels[valid]
        logp = z.log_softmax(1).gather(1, y[:, None]).squeeze(1)
        used = {name: values[valid] for name, values in rows.items()}
        return sum(TERMS[name][1](z, logp, y, used).sum() for name in names) / 7

    return problem.run(loss_of)


OPTIONS = [
    HeadLossOptions(),
    HeadLossOptions(temperature=0.7),
    HeadLossOptions(logit_softcap=2.0, temperature=1.5),
]


@pytest.mark.parametrize("names", [*((n,) for n in TERMS), MIXTURE], ids=", ".join)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "both"])
def test_equals_full_logits_in_float64(names, options, chunks):
    problem = Problem(T=37, D=16, V=101)
    rows = row_inputs(problem)
    truth = truth_of(names, problem, rows, options)
    head = HeadLoss([TERMS[name][0] for name in names], options)
    ours = problem.run(lambda *args: head(*args, normalizer=7, **rows).loss)
    assert max(ours.errors(truth).values()) < 1e-10


@pytest.mark.parametrize("names", [*((n,) for n in TERMS), MIXTURE], ids=", ".join)
def test_in_float32_no_worse_than_float32(names, chunks):
    problem = Problem(T=37, D=16, V=101).rounded(torch.float32)
    rows = row_inputs(problem)
    truth = truth_of(names, problem, rows, HeadLossOptions())
    head = HeadLoss([TERMS[name][0] for name in names])
    narrow = {name: values.float() for name, values in rows.items()}
    ours = problem.run(
        lambda *args: head(*args, normalizer=7, **narrow).loss, torch.float32
    )
    assert max(ours.errors(truth).values()) < 5e-6


def test_terms_and_metrics_are_what_full_logits_give():
    problem = Problem(T=200, D=16, V=11, scale=3.0)
    z = (problem.hidden @ problem.weight.T)[problem.labels != -100]
    y = problem.labels[problem.labels != -100]
    head = HeadLoss([CrossEntropy(), EntropyBonus(0.0)])
    out = head(problem.hidden, problem.weight, problem.labels, normalizer=len(y))
    entropy = torch.distributions.Categorical(logits=z).entropy().mean()
    expected = {
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
    assert plain.metrics.keys() == {"accuracy", "max_prob"}


def test_a_term_of_weight_0_reports_and_leaves_the_gradients_alone():
    problem = Problem()
    head = HeadLoss([CrossEntropy(), ZLoss(0.0)])
    alone = problem.run(lambda *args: HeadLoss()(*args).loss)
    both = problem.run(lambda *args: head(*args).loss)
    assert torch.equal(both.d_weight, alone.d_weight)
    out = head(problem.hidden, problem.weight, problem.labels)
    assert out.terms["z_loss"] > 0


def test_token_weights_multiply_all_terms_and_have_an_exact_gradient(chunks):
    problem = Problem(T=37, D=16, V=101)
    g = torch.Generator().manual_seed(3)
    weights = torch.rand(37, generator=g, dtype=torch.float64)
    weights[problem.labels == -100] = torch.nan
    results = []
    for impl in ("chunked", "reference"):
        learnt = weights.clone().requires_grad_()
        results.append(
            problem.run(
                lambda *args, w=learnt, i=impl: linear_cross_entropy(
                    *args, z_loss=0.1, token_weights=w, impl=i
                ),
                upstream=0.3,
            )
        )
        valid = problem.labels != -100
        losses = linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels, z_loss=0.1, reduction="none"
        )
        expected = 0.3 * losses[valid] / valid.sum()
        torch.testing.assert_close(learnt.grad[valid], expected, rtol=1e-12, atol=0)
        assert not learnt.grad[~valid].nan_to_num().any()
    assert max(results[0].errors(results[1]).values()) < 1e-12


@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.1, "logit_softcap": 2.0}])
def test_losses_per_token_have_exact_gradients(settings, chunks):
    problem = Problem(T=36, D=16, V=101)
    upstream = torch.randn(36, generator=torch.Generator().manual_seed(9)).double()

    def weighted(impl):
        def loss_of(hidden, weight, labels):
            losses = linear_cross_entropy(
                hidden.view(4, 9, -1),
                weight,
                labels.view(4, 9),
                reduction="none",
                impl=impl,
                **settings,
            )
            assert losses.shape == (4, 9)
            return (losses.flatten() * upstream).sum()

        return loss_of

    truth = problem.run(weighted("reference"))
    ours = problem.run(weighted("chunked"))
    assert max(ours.errors(truth).values()) < 1e-12


def test_focal_has_no_nan_where_the_label_is_certain():
    for gamma in (0.5, 1.0, 2.0):
        hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
        for label in (0, 1):
            out = HeadLoss([Focal(gamma)])(hidden, torch.eye(2), torch.tensor([label]))
            (grad,) = torch.autograd.grad(out.loss, hidden)
            assert grad.isfinite().all()
            assert out.loss.isfinite()


def test_constant_shifts_of_the_logits_change_only_the_z_loss():
    problem = Problem(T=20, D=101, V=101)
    problem.weight = torch.eye(101, dtype=torch.float64)  # hidden states are logits
    rows = row_inputs(problem)
    head = HeadLoss([TERMS[n][0] for n in ("smoothed", "focal", "entropy", "ppo")])
    before = problem.run(lambda *args: head(*args, **rows).loss)
    problem.hidden += 50.0
    after = problem.run(lambda *args: head(*args, **rows).loss)
    assert relative_error(after.loss, before.loss) < 1e-11
    assert relative_error(after.d_hidden, before.d_hidden) < 1e-11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadLoss([]), "terms of different names"),
        (lambda: HeadLoss([ZLoss(1.0), ZLoss(2.0)]), "terms of different names"),
        (
            lambda: HeadLoss([ZLoss(1.0, needs=frozenset({"rank"}))]),
            "needs rank; there",
        ),
        (lambda: HeadLoss([ZLoss(1.0)], HeadLossOptions(z_loss=1.0)), "of your own"),
        (lambda: HeadLoss([ZLoss(1.0)], impl="reference"), "default terms only"),
        (lambda: PolicyGradient("grpo"), "ppo, cispo or reinforce, got 'grpo'"),
        (lambda: PolicyGradient(dual_clip=0.5), "above 1, got 0.5"),
        (lambda: ReferenceKL(1.0, "k4"), "got 'k4'"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_row_inputs_must_be_like_the_labels():
    problem = Problem()
    head = HeadLoss([PolicyGradient("reinforce")])
    with pytest.raises(ValueError, match=r"advantages must be like labels, \(257,\)"):
        head(problem.hidden, problem.weight, problem.labels, advantages=torch.ones(3))


def test_a_mixture_is_the_sum_of_its_parts():
    problem = Problem(T=37, D=16, V=101)
    rows = row_inputs(problem)
    parts = [
        problem.run(lambda *args, n=n: HeadLoss([TERMS[n][0]])(*args, **rows).loss)
        for n in MIXTURE
    ]
    head = HeadLoss([TERMS[n][0] for n in MIXTURE])
    whole = problem.run(lambda *args: head(*args, **rows).loss)
    assert relative_error(whole.d_weight, sum(p.d_weight for p in parts)) < 1e-12
    assert relative_error(whole.d_hidden, sum(p.d_hidden for p in parts)) < 1e-12
