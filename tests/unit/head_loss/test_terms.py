"""Every term, and a mixture of them, against full logits and autograd in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import Problem, relative_error, run_on_shards
from torchtitan_liger.head_loss import (
    Collision,
    CrossEntropy,
    Distillation,
    EntropyBonus,
    Focal,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    Preference,
    ReferenceKL,
    SelfWeighted,
    Teacher,
    Term,
    Unlikelihood,
    ZLoss,
    engine,
    linear_cross_entropy,
    passes,
    triton_sweeps,
)


@dataclass(frozen=True)
class Squared(Term):
    """A term as a user writes it."""

    weight: float
    name: str = "squared"
    needs = frozenset({"entropy", "uniform_ce"})

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
    "importance": (
        PolicyGradient("ppo", importance_cap=1.5),
        lambda z, lp, y, r: (
            (r["old_logp"] - r["generation_logp"]).exp().clamp(max=1.5)
            * -torch.minimum(
                (lp - r["old_logp"]).exp() * r["advantages"],
                (lp - r["old_logp"]).exp().clamp(0.8, 1.2) * r["advantages"],
            )
        ),
    ),
    "smoothed over others": (
        CrossEntropy(0.1, smooth_over="others"),
        lambda z, lp, y, r: (
            -0.9 * lp - 0.1 / (z.shape[1] - 1) * (z.log_softmax(1).sum(1) - lp)
        ),
    ),
    "collision": (
        Collision(0.7),
        lambda z, lp, y, r: 0.7 * z.softmax(1).square().sum(1),
    ),
    "unlikelihood": (
        Unlikelihood(0.6),
        lambda z, lp, y, r: (
            -0.6
            * torch.where(
                r["candidates"] >= 0,
                (1 - z.softmax(1).gather(1, r["candidates"].clamp(min=0))).log(),
                0.0,
            ).sum(1)
        ),
    ),
    "forward kl": (
        Distillation("forward_kl", weight=0.8),
        lambda z, lp, y, r: 0.8 * kl(r["teacher"], z),
    ),
    "reverse kl": (
        Distillation("reverse_kl"),
        lambda z, lp, y, r: kl(z, r["teacher"]),
    ),
    "jsd": (
        Distillation("jsd", beta=0.3),
        lambda z, lp, y, r: jsd(z, r["teacher"], 0.3),
    ),
    "jsd, 0": (
        Distillation("jsd", beta=0.0),
        lambda z, lp, y, r: kl(r["teacher"], z),
    ),
    "soft cross entropy": (
        Distillation("soft_cross_entropy"),
        lambda z, lp, y, r: F.cross_entropy(
            z, r["teacher"].softmax(1), reduction="none"
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
EVERYTHING = (
    "cross entropy",
    "z-loss",
    "collision",
    "unlikelihood",
    "ppo",
    "jsd",
    "a user's",
)
SETS = [*((n,) for n in TERMS), MIXTURE, EVERYTHING]


def kl(of, to):
    """KL(softmax(of) | softmax(to)) of each row."""
    return F.kl_div(
        to.log_softmax(1), of.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)


def jsd(z, teacher, beta):
    mixture = (beta * teacher.softmax(1) + (1 - beta) * z.softmax(1)).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(z, mixture)


class Unknown(Term):
    name, weight, needs = "unknown", 1.0, frozenset({"rank"})


def dual_clip(lp, r):
    ratio = (lp - r["old_logp"]).exp()
    a = r["advantages"]
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return torch.where(a < 0, torch.minimum(loss, -3.0 * a), loss)


@pytest.fixture(params=["torch", "triton"])
def sweeps(request, monkeypatch):
    """Both implementations of the passes; Triton's on its interpreter."""
    if request.param == "triton":
        one_at_a_time = threading.Lock()  # the interpreter knows one grid

        def locked(sweep):
            def run(*args, **kwargs):
                with one_at_a_time:
                    return sweep(*args, **kwargs)

            return run

        names = ["statistics_sweep", "mixture_sweep", "gradient_sweep", "both_sweeps"]
        locked_sweeps = {name: locked(getattr(triton_sweeps, name)) for name in names}
        module = SimpleNamespace(**locked_sweeps)
        monkeypatch.setattr(passes, "sweeps_for", lambda _: module)
    return request.param


@pytest.fixture(params=[11, 10**6], ids="{}_tokens_per_chunk".format)
def chunks(request, monkeypatch):
    plan = engine.ChunkPlan(request.param, 0, 0, 0)
    monkeypatch.setattr(engine, "plan_chunks", lambda *_, **__: plan)


def row_inputs(problem: Problem) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    logp = (problem.hidden @ problem.weight.T).log_softmax(1)
    logp = logp.gather(1, problem.labels.clamp(min=0)[:, None]).squeeze(1)
    noise = torch.randn(4, problem.T, generator=g, dtype=torch.float64)
    rows = {
        "advantages": noise[0],
        "old_logp": logp + 0.5 * noise[1],
        "ref_logp": logp + 0.5 * noise[2],
        "generation_logp": logp + 0.5 * noise[3],
        "teacher": torch.randn(problem.T, problem.V, generator=g, dtype=torch.float64),
    }
    for values in rows.values():  # what is not used may hold anything
        values[problem.labels == -100] = torch.nan
    # Some are missing, some come twice, and some are the label.
    candidates = torch.randint(-1, problem.V, (problem.T, 4), generator=g)
    candidates[:, 3] = candidates[:, 2]
    candidates[::5, 0] = problem.labels[::5].clamp(min=-1)
    return rows | {"candidates": candidates}


def inputs_of(names, rows):
    """What the call gets: only what the terms read, and a teacher is no number."""
    terms = [TERMS[name][0] for name in names]
    wanted = frozenset().union(*(term.inputs for term in terms))
    given = {name: rows[name] for name in rows if name in wanted}
    if any(isinstance(term, Distillation) for term in terms):
        given["teacher"] = Teacher(logits=rows["teacher"])
    return given


def truth_of(names, problem, rows, options, dtype=torch.float64, device="cpu"):
    rows = {name: values.to(device) for name, values in rows.items()}

    def loss_of(hidden, weight, labels):
        z = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32))
        if options.logit_softcap:
            z = options.logit_softcap * torch.tanh(z / options.logit_softcap)
        z = z / options.temperature
        valid = labels != -100
        z, y = z[valid], labels[valid]
        logp = z.log_softmax(1).gather(1, y[:, None]).squeeze(1)
        used = {name: values[valid] for name, values in rows.items()}
        return sum(TERMS[name][1](z, logp, y, used).sum() for name in names) / 7

    return problem.run(loss_of, dtype, device)


OPTIONS = [
    HeadLossOptions(),
    HeadLossOptions(temperature=0.7),
    HeadLossOptions(logit_softcap=2.0, temperature=1.5),
]


@pytest.mark.parametrize("names", SETS, ids=", ".join)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "both"])
def test_equals_full_logits_in_float64(names, options, chunks, sweeps):
    problem = Problem(T=37, D=16, V=101)
    rows = row_inputs(problem)
    truth = truth_of(names, problem, rows, options)
    head, given = (
        HeadLoss([TERMS[n][0] for n in names], options),
        inputs_of(names, rows),
    )
    ours = problem.run(lambda *args: head(*args, normalizer=7, **given).loss)
    assert max(ours.errors(truth).values()) < 1e-10


@pytest.mark.parametrize("names", SETS, ids=", ".join)
def test_on_three_uneven_shards(names, sweeps, chunks, monkeypatch):
    problem = Problem(T=37, D=16, V=101)
    rows = row_inputs(problem)
    options = HeadLossOptions(logit_softcap=3.0)
    truth = truth_of(names, problem, rows, options)
    head = HeadLoss([TERMS[name][0] for name in names], options)
    ours = run_on_shards(
        monkeypatch, head, problem, [60, 0, 41], normalizer=7, **inputs_of(names, rows)
    )
    assert max(ours.errors(truth).values()) < 1e-10


@pytest.mark.parametrize("columns", [[40], [30, 10], [20, 0, 20]], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_words_that_the_teacher_does_not_have_and_the_student_never_says(
    kind, columns, monkeypatch
):
    """Also where a rank has no other words."""
    g = torch.Generator().manual_seed(5)
    problem = Problem(T=3, D=1, V=40, ignored=0)
    problem.hidden = torch.ones(3, 1, dtype=torch.float64)
    problem.labels = torch.tensor([1, 2, 3])
    logits = torch.randn(3, 40, generator=g, dtype=torch.float64)
    few = Problem(T=3, D=1, V=30, ignored=0)
    few.hidden, few.labels = problem.hidden, problem.labels
    few.weight = problem.weight[:30].clone()
    problem.weight[30:], logits[:, 30:] = -1e4, -torch.inf
    head = HeadLoss([Distillation(kind)])
    ours = run_on_shards(
        monkeypatch, head, problem, columns, teacher=Teacher(logits=logits)
    )
    teacher = Teacher(logits=logits[:, :30])
    truth = few.run(lambda *args: head(*args, teacher=teacher).loss)
    torch.testing.assert_close(ours.loss, truth.loss)
    torch.testing.assert_close(ours.d_weight[:30], truth.d_weight)
    assert not ours.d_weight[30:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", SETS, ids=", ".join)
def test_error_is_at_most_twice_that_of_full_logits(names, dtype, sweeps):
    problem = Problem(T=64, D=64, V=301).rounded(dtype)
    rows = row_inputs(problem)
    rows["teacher"] = rows["teacher"].to(dtype).double()
    truth = truth_of(names, problem, rows, HeadLossOptions())
    narrow = {
        name: values.float() if values.is_floating_point() else values
        for name, values in rows.items()
    }
    stock = truth_of(names, problem, narrow, HeadLossOptions(), dtype).errors(truth)
    head, given = HeadLoss([TERMS[name][0] for name in names]), inputs_of(names, narrow)
    ours = problem.run(lambda *args: head(*args, normalizer=7, **given).loss, dtype)
    floor = 8 * torch.finfo(torch.float32).eps
    # The interpreter cuts bfloat16 off, where a GPU rounds.
    factor = 4 if sweeps == "triton" and dtype == torch.bfloat16 else 2
    for name, error in ours.errors(truth).items():
        assert error <= max(factor * stock[name], floor), (
            name,
            ours.errors(truth),
            stock,
        )


def test_a_teacher_may_be_hidden_states_and_a_weight():
    problem = Problem(T=37, D=16, V=101)
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(37, 24, generator=g, dtype=torch.float64)
    weight = torch.randn(101, 24, generator=g, dtype=torch.float64)
    logits = 5 * torch.tanh(hidden @ weight.T / 5) / 2
    head = HeadLoss([CrossEntropy(), Distillation("reverse_kl")])
    settings = {"temperature": 2.0, "logit_softcap": 5.0}
    runs = [
        problem.run(lambda *args, t=teacher: head(*args, teacher=t).loss)
        for teacher in (
            Teacher(hidden=hidden, weight=weight, **settings),
            Teacher(logits=hidden @ weight.T, **settings),
            Teacher(logits=logits),
        )
    ]
    assert max(runs[0].errors(runs[2]).values()) < 1e-12
    assert max(runs[1].errors(runs[2]).values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_teacher_may_have_a_dtype_of_its_own(dtype, sweeps):
    problem = Problem(T=37, D=16, V=101)
    head = HeadLoss([CrossEntropy(), Distillation("jsd")])
    logits = row_inputs(problem)["teacher"].to(dtype)
    runs = [
        problem.run(
            lambda *args, t=t: head(*args, teacher=Teacher(t)).loss, torch.float32
        )
        for t in (logits, logits.float())
    ]
    assert max(runs[0].errors(runs[1]).values()) < 1e-6


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_that_is_the_student_teaches_nothing(kind, sweeps):
    problem = Problem(T=37, D=16, V=101)
    teacher = Teacher(hidden=problem.hidden, weight=problem.weight)
    head = HeadLoss([Distillation(kind)])
    run = problem.run(lambda *args: head(*args, teacher=teacher).loss)
    assert abs(run.loss) < 1e-12
    assert run.d_hidden.abs().max() < 1e-12


@pytest.mark.parametrize("names", SETS, ids=", ".join)
def test_ignored_tokens_that_are_not_dropped_have_no_share(names, chunks, monkeypatch):
    """As on a GPU, where nobody has counted the labels."""
    monkeypatch.setattr(engine, "kept_rows", lambda call, *_: (None, call.scale, False))
    problem = Problem(T=37, D=16, V=101)
    rows = row_inputs(problem)
    truth = truth_of(names, problem, rows, HeadLossOptions())
    problem.hidden[problem.labels == -100] = torch.nan
    head, given = HeadLoss([TERMS[name][0] for name in names]), inputs_of(names, rows)
    ours = problem.run(lambda *args: head(*args, normalizer=7, **given).loss)
    assert not ours.d_hidden[problem.labels == -100].any()
    assert max(ours.errors(truth).values()) < 1e-10


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


@pytest.mark.parametrize("what", ["teacher", "candidates"])
def test_what_a_second_phase_reads_may_not_change_before(what):
    """Autograd knows of hidden states and weight; of the others it has to be told."""
    problem = Problem(T=8, D=16, V=101, ignored=0)
    changed = {
        "teacher": torch.randn(8, 101).double(),
        "candidates": torch.randint(101, (8, 2)),
    }
    head_loss = HeadLoss([CrossEntropy(), Distillation(), Unlikelihood()])
    hidden = problem.hidden.clone().requires_grad_()
    losses = head_loss(
        *(hidden, problem.weight, problem.labels),
        teacher=Teacher(logits=changed["teacher"]),
        candidates=changed["candidates"],
        reduction="none",
    ).loss
    changed[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


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
    names = ("smoothed", "focal", "entropy", "ppo")
    given = inputs_of(names, row_inputs(problem))
    head = HeadLoss([TERMS[n][0] for n in names])
    before = problem.run(lambda *args: head(*args, **given).loss)
    problem.hidden += 50.0
    after = problem.run(lambda *args: head(*args, **given).loss)
    assert relative_error(after.loss, before.loss) < 1e-11
    assert relative_error(after.d_hidden, before.d_hidden) < 1e-11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadLoss([]), "at least one term"),
        (lambda: HeadLoss([ZLoss(1.0), ZLoss(2.0)]), "terms of different names"),
        (lambda: HeadLoss([Unknown()]), "needs rank; there"),
        (lambda: HeadLoss([ZLoss(1.0)], HeadLossOptions(z_loss=1.0)), "of your own"),
        (lambda: HeadLoss([ZLoss(1.0)], impl="reference"), "default terms only"),
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
        (lambda: Teacher(logits=torch.ones(1), temperature=0.0), "positive, got 0.0"),
        (lambda: CrossEntropy(1.0), r"in \[0, 1\), got 1.0"),
        (lambda: Focal(-1.0), "at least 0, got -1.0"),
        (lambda: Preference("kto"), "got 'kto'"),
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
    call = (problem.hidden, problem.weight, problem.labels)
    with pytest.raises(ValueError, match=r"advantages must be like labels, \(257,\)"):
        head(*call, advantages=torch.ones(3))
    with pytest.raises(ValueError, match="advantages is not given"):
        head(*call)
    with pytest.raises(
        ValueError, match=r"inputs \(none\): token_weight is read by none"
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


def test_a_mixture_is_the_sum_of_its_parts():
    problem = Problem(T=37, D=16, V=101)
    rows = row_inputs(problem)
    parts = [
        problem.run(
            lambda *args, n=n: (
                HeadLoss([TERMS[n][0]])(*args, **inputs_of((n,), rows)).loss
            )
        )
        for n in MIXTURE
    ]
    head = HeadLoss([TERMS[n][0] for n in MIXTURE])
    whole = problem.run(lambda *args: head(*args, **inputs_of(MIXTURE, rows)).loss)
    assert relative_error(whole.d_weight, sum(p.d_weight for p in parts)) < 1e-12
    assert relative_error(whole.d_hidden, sum(p.d_hidden for p in parts)) < 1e-12


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
class Returns(Term):
    """A term that gives tensors of a wrong shape."""

    make: Callable[[torch.Tensor], torch.Tensor]
    weight: float = 1.0
    name: str = "mine"

    def loss(self, stats, rows):
        return self.make(stats.logp)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda x: x[:, None], r"\[5, 1\]"), (lambda x: x.sum(), r"\[\]")],
)
def test_a_term_gives_one_loss_for_each_token(make, shape):
    problem = Problem(T=5, D=16, V=101, ignored=0)
    with pytest.raises(ValueError, match=rf"mine must give .*\[5\], got {shape}"):
        HeadLoss([Returns(make)])(problem.hidden, problem.weight, problem.labels)


@dataclass(frozen=True)
class Undeclared(Term):
    """Reads what only another term of the mixture has asked for."""

    weight: float = 1.0
    name: str = "undeclared"

    def loss(self, stats, rows):
        return stats.entropy.square()


def test_a_statistic_of_another_term_has_its_gradient_too():
    problem = Problem(T=37, D=16, V=101)
    head = HeadLoss([EntropyBonus(0.2), Undeclared()])
    ours = problem.run(lambda *args: head(*args).loss)

    def loss_of(hidden, weight, labels):
        z = (hidden @ weight.T)[labels != -100]
        entropy = torch.distributions.Categorical(logits=z).entropy()
        return (entropy.square() - 0.2 * entropy).sum()

    assert max(ours.errors(problem.run(loss_of)).values()) < 1e-10


def test_a_nan_in_a_labeled_row_is_in_its_gradient(sweeps):
    problem = Problem(T=5, D=16, V=101, ignored=0)
    problem.hidden[2, 3] = torch.nan
    run = problem.run(lambda *args: HeadLoss([EntropyBonus(1.0)])(*args).loss)
    assert run.loss.isnan()
    assert run.d_hidden.isnan().any(dim=1).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
