"""What a call with terms takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    EntropyBonus,
    HeadLoss,
    PolicyGradient,
    ReferenceKL,
    Teacher,
    Term,
    Unlikelihood,
    linear_cross_entropy,
)


@dataclass(frozen=True)
class Looked(Term):
    """Reads a table of its own, in float64, by an integer of each token."""

    weight: float = 1.0
    name: str = "looked"
    inputs = frozenset({"word"})
    metric_names = ("factor", "factor/min", "is_one/min")

    def loss(self, stats, rows):
        return -self.factor(rows) * stats.logp

    def metrics(self, stats, rows):
        return self.factor(rows), self.factor(rows), rows["word"] == 1

    @staticmethod
    def factor(rows):
        return torch.arange(9, dtype=torch.float64)[rows["word"]]


def test_wider_numbers_of_a_term_do_not_widen_the_loss():
    problem = Problem(T=9, D=8, V=21)
    word = torch.arange(9) % 3 + 1
    truth = HeadLoss([Looked()])(
        problem.hidden, problem.weight, problem.labels, word=word
    )
    args = problem.hidden.float(), problem.weight.float(), problem.labels
    out = HeadLoss([Looked()])(*args, word=word)
    for x in (out.loss, *out.terms.values(), *out.metrics.values()):
        assert x.dtype == torch.float32
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-6)
    kept = problem.labels != -100
    assert out.metrics["looked/factor"] == word[kept].sum()
    assert out.metrics["looked/factor/min"] == word[kept].min()
    assert out.metrics["looked/is_one/min"] == 0


def test_advantages_may_be_integers():
    problem = Problem(T=9, D=8, V=21)
    args, ones = (problem.hidden, problem.weight, problem.labels), torch.ones(9)
    head_loss = HeadLoss([PolicyGradient("reinforce")])
    truth = head_loss(*args, advantages=ones)
    for dtype in (torch.uint8, torch.bool, torch.int64):
        out = head_loss(*args, advantages=ones.to(dtype))
        assert out.loss == truth.loss
        assert out.metrics == truth.metrics


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_wider_token_weights_do_not_widen_the_loss(impl):
    problem = Problem(T=9, D=8, V=21)
    args = problem.hidden.float(), problem.weight.float(), problem.labels
    weights = torch.rand(9, dtype=torch.float64, requires_grad=True)
    out = HeadLoss(impl=impl)(*args, token_weights=weights)
    assert out.loss.dtype == out.terms["cross_entropy"].dtype == torch.float32
    (grad,) = torch.autograd.grad(out.loss, weights)
    assert grad.dtype == torch.float64


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


@pytest.mark.parametrize("what", ["teacher", "candidates", "word"])
def test_what_a_second_phase_reads_may_not_change_before(what):
    """Autograd knows of hidden states and weight; of the others it has to be told."""
    problem = Problem(T=8, D=16, V=101, ignored=0)
    changed = {
        "teacher": torch.randn(8, 101).double(),
        "candidates": torch.randint(101, (8, 2)),
        "word": torch.ones(8, dtype=torch.long),
    }
    head_loss = HeadLoss([CrossEntropy(), Distillation(), Unlikelihood(), Looked()])
    hidden = problem.hidden.clone().requires_grad_()
    losses = head_loss(
        *(hidden, problem.weight, problem.labels),
        teacher=Teacher(logits=changed["teacher"]),
        candidates=changed["candidates"],
        word=changed["word"],
        reduction="none",
    ).loss
    changed[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


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


class SquaredCrossEntropy(CrossEntropy):
    def loss(self, stats, rows):
        return super().loss(stats, rows).square()


class TargetEntropy(EntropyBonus):
    def loss(self, stats, rows):
        return (super().loss(stats, rows) + 1.5).square()


@pytest.mark.parametrize("kind", ["cross entropy", "entropy"])
def test_a_subclass_with_a_loss_of_its_own_has_not_its_parents_gradient(kind, chunks):
    problem = Problem(T=37, D=16, V=101)

    def truth_of(hidden, weight, labels):
        log_p = (hidden @ weight.T).log_softmax(-1)
        loss = torch.nn.functional.nll_loss(log_p, labels, reduction="none")
        if kind == "entropy":
            loss = torch.where(labels == -100, 0.0, 1.5 + (log_p.exp() * log_p).sum(-1))
        return loss.square().sum()

    term = SquaredCrossEntropy() if kind == "cross entropy" else TargetEntropy(1.0)
    head = HeadLoss([term])
    ours = problem.run(lambda *args: head(*args).loss)
    assert max(ours.errors(problem.run(truth_of)).values()) < 1e-12


def test_a_row_input_that_wants_a_gradient_is_an_error():
    problem = Problem(T=9, D=8, V=21)
    args = problem.hidden, problem.weight, problem.labels
    head, advantages = HeadLoss([PolicyGradient("reinforce")]), torch.ones(9)
    advantages.requires_grad_()
    with pytest.raises(ValueError, match="advantages would get no gradient.*detach"):
        head(*args, advantages=advantages)
    with torch.no_grad():
        head(*args, advantages=advantages)


def test_losses_per_token_read_each_input_again_as_itself():
    problem = Problem(T=37, D=16, V=101)
    rows = {
        "ref_logp": torch.linspace(-6, -4, 37).double(),
        "candidates": torch.arange(74).view(37, 2),
    }
    head = HeadLoss([ReferenceKL(0.1), Unlikelihood()])
    truth = problem.run(lambda *args: head(*args, **rows).loss)
    ours = problem.run(lambda *args: head(*args, reduction="none", **rows).loss.sum())
    assert max(ours.errors(truth).values()) < 1e-12


@pytest.mark.parametrize(
    ("kind", "dtype"), [("none", torch.float32), ("sum", torch.float16)]
)
def test_a_backward_pass_frees_what_the_logits_were_computed_from(kind, dtype):
    problem = Problem(T=37, D=16, V=101)
    hidden, weight = (
        x.to(dtype).requires_grad_() for x in (problem.hidden, problem.weight)
    )
    teacher = Teacher(logits=torch.randn(37, 101))
    memory = StorageWeakRef(teacher.logits.untyped_storage())
    head = HeadLoss([Distillation()])
    out = head(hidden, weight, problem.labels, teacher=teacher, reduction=kind)
    del teacher
    assert not memory.expired()
    out.loss.sum().backward()
    assert memory.expired()


@dataclass(frozen=True)
class SoftCrossEntropy(Term):
    weight: float = 1.0
    name: str = "soft"
    needs = frozenset({"kl_fwd", "teacher_entropy"})

    def loss(self, stats, rows):
        return stats.kl_fwd + stats.teacher_entropy


def test_a_term_may_read_the_teachers_entropy():
    problem = Problem(T=37, D=16, V=101)
    teacher = Teacher(logits=torch.randn(37, 101).double())
    ours, truth = (
        problem.run(lambda *args, t=term: HeadLoss([t])(*args, teacher=teacher).loss)
        for term in (SoftCrossEntropy(), Distillation("soft_cross_entropy"))
    )
    assert max(ours.errors(truth).values()) < 1e-12


def test_any_negative_candidate_stands_for_none():
    problem = Problem(T=9, D=8, V=21)
    args = problem.hidden, problem.weight, problem.labels
    one, none = torch.arange(9)[:, None], torch.full((9, 1), -100)
    head = HeadLoss([Unlikelihood()])
    padded = head(*args, candidates=torch.cat([one, none], 1))
    assert padded.loss == head(*args, candidates=one).loss


def test_losses_per_token_of_candidates_have_exact_gradients():
    problem = Problem(T=37, D=16, V=101)
    rows = {"candidates": torch.arange(74).view(37, 2)}
    upstream = torch.linspace(-1, 2, 37).double()
    head = HeadLoss([Unlikelihood()])
    truth = problem.run(lambda *args: head(*args, token_weights=upstream, **rows).loss)

    def weighted(*args):
        return (head(*args, reduction="none", **rows).loss * upstream).sum()

    assert max(problem.run(weighted).errors(truth).values()) < 1e-12


def test_inference_mode_gives_the_same_loss():
    problem = Problem(T=9, D=8, V=21)
    args = problem.hidden, problem.weight, problem.labels
    head = HeadLoss([CrossEntropy(), PolicyGradient("reinforce")])
    with torch.inference_mode():
        inside = head(*args, advantages=torch.ones(9).double()).loss
    assert inside == head(*args, advantages=torch.ones(9).double()).loss


def test_narrow_rows_are_computed_with_in_the_dtype_of_the_sums():
    problem = Problem(T=9, D=8, V=21, ignored=0)
    rows = {
        "advantages": torch.ones(9),
        "old_logp": torch.linspace(-3, -1, 9).bfloat16(),
        "generation_logp": torch.linspace(-3.3, -0.7, 9).bfloat16(),
    }
    head = HeadLoss([PolicyGradient("reinforce", importance_cap=10.0)])
    args = problem.hidden, problem.weight, problem.labels
    wide = {name: values.double() for name, values in rows.items()}
    found, expected = (head(*args, **given).loss.item() for given in (rows, wide))
    assert found == pytest.approx(expected, rel=1e-12)
