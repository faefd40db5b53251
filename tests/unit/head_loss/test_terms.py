"""Every term, and a mixture of them, against full logits and autograd in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from tests.helpers import Problem, full_logits, relative_error, run_on_shards
from tests.unit.head_loss.term_cases import (
    MIXTURE,
    OPTIONS,
    SETS,
    TERMS,
    inputs_of,
    row_inputs,
    truth_of,
)
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    EntropyBonus,
    Focal,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    SequencePolicyGradient,
    Teacher,
    Term,
    Unlikelihood,
)
from torchtitan_liger.head_loss.terms import _log_miss


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
def test_token_ids_that_the_teacher_does_not_have_and_the_student_never_says(
    kind, columns, monkeypatch
):
    """Also where a rank has no other token ids."""
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
def test_ignored_tokens_that_are_not_dropped_have_no_share(
    names, chunks, nothing_dropped
):
    nothing_dropped()
    problem = Problem(T=37, D=16, V=101)
    rows = row_inputs(problem)
    truth = truth_of(names, problem, rows, HeadLossOptions())
    problem.hidden[problem.labels == -100] = torch.nan
    head, given = HeadLoss([TERMS[name][0] for name in names]), inputs_of(names, rows)
    ours = problem.run(lambda *args: head(*args, normalizer=7, **given).loss)
    assert not ours.d_hidden[problem.labels == -100].any()
    assert max(ours.errors(truth).values()) < 1e-10


def test_what_is_reported_has_no_share_of_tokens_that_are_not_dropped(nothing_dropped):
    problem = Problem(T=37, D=16, V=101)
    args = problem.hidden, problem.weight, problem.labels
    head = HeadLoss([CrossEntropy(), EntropyBonus(0.1)])
    truth = head(*args)
    nothing_dropped()
    ours = head(*args)
    for found, expected in ((ours.terms, truth.terms), (ours.metrics, truth.metrics)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)


def test_a_term_that_divides_by_a_row_has_no_nan_of_an_ignored_token(nothing_dropped):
    @dataclass(frozen=True)
    class OverLength(Term):
        weight: float = 1.0
        name: str = "over_length"
        inputs = frozenset({"length"})

        def loss(self, stats, rows):
            return -stats.logp / rows["length"]

    problem = Problem(T=37, D=16, V=101)
    head, length = HeadLoss([OverLength()]), torch.arange(1.0, 38)
    truth = problem.run(lambda *args: head(*args, length=length).loss)
    nothing_dropped()
    ours = problem.run(lambda *args: head(*args, length=length).loss)
    assert max(ours.errors(truth).values()) < 1e-12


def test_a_teachers_logits_may_have_any_strides(sweeps):
    problem = Problem(T=9, D=8, V=31, ignored=0)
    given = torch.randn(9, 31, generator=torch.Generator().manual_seed(0)).double()
    head = HeadLoss([Distillation()])
    truth, ours = (
        problem.run(lambda *args, t=t: head(*args, teacher=Teacher(logits=t)).loss)
        for t in (given, given.t().contiguous().t())
    )
    assert max(ours.errors(truth).values()) < 1e-14


def test_focal_has_no_nan_where_the_label_is_certain():
    for gamma in (0.5, 1.0, 2.0):
        hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
        for label in (0, 1):
            out = HeadLoss([Focal(gamma)])(hidden, torch.eye(2), torch.tensor([label]))
            (grad,) = torch.autograd.grad(out.loss, hidden)
            assert grad.isfinite().all()
            assert out.loss.isfinite()


@pytest.mark.parametrize("old_logp", [-1e4, -torch.inf])
@pytest.mark.parametrize(
    ("term", "advantage", "loss"),
    [
        (PolicyGradient("ppo", 0.2, 0.28), 2.0, -2 * 1.28),
        (PolicyGradient("ppo"), 0.0, 0.0),
        (PolicyGradient("ppo", dual_clip=3.0), -2.0, 2 * 3.0),
        (PolicyGradient("cispo", clip_high=0.0), 2.0, None),
        (SequencePolicyGradient(0.1, 0.1), 2.0, -2 * 1.1),
    ],
)
def test_a_token_of_which_the_sampler_was_sure_that_it_would_not_come(
    term, advantage, loss, old_logp
):
    """Beyond its bound the ratio is a constant, though it be infinite."""
    problem = Problem(T=3, D=8, V=11, ignored=0).rounded(torch.float32)
    rows = {
        "advantages": torch.full((3,), advantage),
        "old_logp": torch.full((3,), old_logp),
    }
    args = [x.float() for x in (problem.hidden, problem.weight)]
    metrics = HeadLoss([term])(*args, problem.labels, **rows).metrics
    assert metrics[f"{term.name}/kl_new_old"] == torch.inf
    run = problem.run(lambda *args: HeadLoss([term])(*args, **rows).loss, torch.float32)
    if loss is None:
        head = HeadLoss([PolicyGradient("reinforce")])
        rows = {"advantages": rows["advantages"]}
        other = problem.run(lambda *args: head(*args, **rows).loss, torch.float32)
        assert torch.equal(run.loss, other.loss)
        assert torch.equal(run.d_hidden, other.d_hidden)
        return
    assert run.loss.item() == pytest.approx(3 * loss)
    assert not run.d_hidden.any()
    assert not run.d_weight.any()


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


@pytest.mark.parametrize(("softcap", "size"), [(3.0, 30.0), (30.0, 300.0)])
def test_logits_that_reach_their_softcap(softcap, size, sweeps):
    """Where nothing is left of 1 - tanh ** 2, the gradient still is."""
    for seed in range(6):
        problem = Problem(T=4, D=8, V=257, ignored=0, seed=seed, scale=size)
        problem = problem.rounded(torch.float32)
        truth = problem.run(full_logits(logit_softcap=softcap))
        stock = problem.run(full_logits(logit_softcap=softcap), torch.float32)
        head = HeadLoss(options=HeadLossOptions(logit_softcap=softcap))
        ours = problem.run(lambda *args, h=head: h(*args).loss, torch.float32)
        for name, error in ours.errors(truth).items():
            assert error <= max(2 * stock.errors(truth)[name], 5e-6), (name, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_narrower_teacher_is_transformed_in_the_students_dtype(dtype, sweeps):
    problem = Problem(T=9, D=8, V=31, ignored=0)
    given = torch.randn(9, 31, generator=torch.Generator().manual_seed(0)).to(dtype)
    head = HeadLoss([Distillation()])
    teacher = Teacher(logits=given, temperature=1.3, logit_softcap=5.0)

    def truth_of(hidden, weight, _labels):
        log_q = (5 * (given.double() / 5).tanh() / 1.3).log_softmax(-1)
        log_p = (hidden @ weight.T).log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum()

    ours = problem.run(lambda *args: head(*args, teacher=teacher).loss)
    assert max(ours.errors(problem.run(truth_of)).values()) < 1e-12


def test_how_unlikely_a_token_is_keeps_its_digits():
    """Where it is nearly sure, and where it is not."""
    logp = torch.tensor([-1e-6, -1e-4, -0.1, -3.0])
    expected = _log_miss(logp.double())
    torch.testing.assert_close(_log_miss(logp).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("floor", [1e-5, 0.1])
def test_a_sure_token_that_should_not_come_has_the_floors_loss_and_no_gradient(floor):
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    head, labels = HeadLoss([Unlikelihood(floor=floor)]), torch.tensor([1])
    loss = head(hidden, torch.eye(2), labels, candidates=torch.tensor([[0]])).loss
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == pytest.approx(-math.log(floor), rel=1e-3)
    assert not grad.any()


def test_a_vocabulary_of_one_has_no_others():
    head = HeadLoss([CrossEntropy(0.1, smooth_over="others")])
    assert head(torch.randn(3, 4), torch.randn(1, 4), torch.zeros(3).long()).loss == 0
