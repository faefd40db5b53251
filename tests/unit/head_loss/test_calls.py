"""What a call takes, and whose its gradients are."""

from __future__ import annotations

import builtins
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import torchtitan_liger.head_loss.sweeps as torch_sweeps
from tests.helpers import Problem, full_logits, plain_head, relative_error
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    HeadLoss,
    Teacher,
    Unlikelihood,
    chunking,
    linear_cross_entropy,
    passes,
)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_mean_divides_by_the_tokens_with_a_label(impl):
    problem = Problem()
    truth = problem.run(lambda h, w, y: F.cross_entropy(h @ w.T, y))
    ours = problem.run(partial(linear_cross_entropy, impl=impl))
    assert max(ours.errors(truth).values()) < 1e-12


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_gradients_scale_with_the_incoming_gradient(impl):
    problem = Problem()
    once = problem.run(partial(linear_cross_entropy, impl=impl))
    scaled = problem.run(partial(linear_cross_entropy, impl=impl), upstream=-0.37)
    assert relative_error(scaled.d_hidden, -0.37 * once.d_hidden) < 1e-14
    assert relative_error(scaled.d_weight, -0.37 * once.d_weight) < 1e-14


def test_gradients_add_to_those_that_are_there():
    problem = Problem()
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    linear_cross_entropy(hidden, weight, problem.labels).backward()
    first = weight.grad.clone()
    linear_cross_entropy(hidden, weight, problem.labels).backward()
    assert torch.equal(weight.grad, 2 * first)


def test_backward_twice_gives_the_same_gradients():
    problem = Problem()
    weight = problem.weight.clone().requires_grad_()
    loss = linear_cross_entropy(problem.hidden, weight, problem.labels) * 0.5
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


def test_gradients_belong_to_the_caller():
    """Three passes over one graph, with what they gave changed in between."""
    problem = Problem()
    truth = problem.run(linear_cross_entropy)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, problem.labels)
    for _ in range(3):
        loss.backward(retain_graph=True)
        hidden.grad.data.mul_(5)
        weight.grad.data.mul_(5)
        hidden.grad = weight.grad = None
    loss.backward()
    assert torch.equal(hidden.grad, truth.d_hidden)
    assert torch.equal(weight.grad, truth.d_weight)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_normalizer_may_be_any_tensor_of_one_element(impl):
    problem = Problem()
    losses = [
        HeadLoss(impl=impl)(
            problem.hidden, problem.weight, problem.labels, normalizer=normalizer
        ).loss
        for normalizer in (7, 7.0, Fraction(7), torch.tensor(7), torch.tensor([7.0]))
    ]
    assert all(loss.shape == () for loss in losses)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_frozen_inputs_get_no_gradient():
    problem = Problem()
    truth = problem.run(linear_cross_entropy)
    hidden = problem.hidden.clone().requires_grad_()
    linear_cross_entropy(hidden, problem.weight, problem.labels).backward()
    assert relative_error(hidden.grad, truth.d_hidden) < 1e-14
    weight = problem.weight.clone().requires_grad_()
    linear_cross_entropy(problem.hidden, weight, problem.labels).backward()
    assert relative_error(weight.grad, truth.d_weight) < 1e-14


def test_no_grad_gives_the_same_loss_and_no_graph():
    problem = Problem()
    weight = problem.weight.clone().requires_grad_()
    with_grad = linear_cross_entropy(problem.hidden, weight, problem.labels)
    with torch.no_grad():
        without = linear_cross_entropy(problem.hidden, weight, problem.labels)
    assert torch.equal(with_grad, without)
    assert not without.requires_grad


def test_any_leading_shape_and_any_strides():
    problem = Problem(T=60)
    flat = linear_cross_entropy(problem.hidden, problem.weight, problem.labels)
    shaped = linear_cross_entropy(
        problem.hidden.reshape(3, 4, 5, -1),
        problem.weight,
        problem.labels.view(3, 4, 5),
    )
    assert torch.equal(shaped, flat)
    wide = torch.zeros(60, 2 * 48, dtype=torch.float64)
    wide[:, ::2] = problem.hidden
    transposed = problem.weight.T.contiguous().T
    strided = linear_cross_entropy(wide[:, ::2], transposed, problem.labels)
    torch.testing.assert_close(strided, flat, rtol=1e-14, atol=0)


def test_another_ignore_index():
    problem = Problem(ignore_index=3)
    truth = problem.run(lambda h, w, y: F.cross_entropy(h @ w.T, y, ignore_index=3))
    ours = problem.run(partial(linear_cross_entropy, ignore_index=3))
    assert max(ours.errors(truth).values()) < 1e-12


def test_under_autocast_float32_parameters_get_the_float32_sum():
    """One rounding less than casting the weight outside."""
    problem = Problem(T=300, D=64, V=1000).rounded(torch.bfloat16)
    truth = problem.run(full_logits())

    def autocast(loss_of):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(*args)

        return run

    stock = problem.run(autocast(full_logits()), torch.float32)
    ours = problem.run(
        autocast(partial(linear_cross_entropy, reduction="sum")), torch.float32
    )
    stock_errors, errors = stock.errors(truth), ours.errors(truth)
    assert errors["d_weight"] < stock_errors["d_weight"]
    assert errors["d_hidden"] <= 1.1 * stock_errors["d_hidden"]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_derivative_is_an_error_and_not_zero(reduction):
    problem = Problem()
    weight = problem.weight.clone().requires_grad_()

    def loss_of(weight):
        args = problem.hidden, weight, problem.labels
        return linear_cross_entropy(*args, reduction=reduction).sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_of(weight), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.vhp(loss_of, weight.detach(), problem.weight)


def test_a_checkpoint_computes_its_region_again_in_the_backward_pass_alone():
    problem = Problem()
    calls = []

    def region(hidden):
        calls.append(torch._C._current_graph_task_id() != -1)  # in a backward pass
        # Derivatives that are no constants, in four chunks.
        args = hidden.tanh(), problem.weight, problem.labels
        return plain_head(z_loss=0.1, logits_memory_mib=1)(*args).loss

    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "MIB", problem.weight.shape[0] * 8 * 64)
        for again in (False, True):
            hidden = problem.hidden.clone().requires_grad_()
            loss = (
                checkpoint(region, hidden, use_reentrant=False)
                if again
                else region(hidden)
            )
            loss.backward()
            gradients.append(hidden.grad)
    assert calls == [False, False, True]
    assert torch.equal(*gradients)


def test_a_loss_needs_no_hooks_of_saved_tensors():
    problem = Problem()
    head = plain_head(z_loss=0.1)
    plain = problem.run(lambda *args: head(*args).loss)
    with torch.autograd.graph.disable_saved_tensors_hooks("there are none here"):
        ours = problem.run(lambda *args: head(*args).loss)
    assert torch.equal(ours.d_weight, plain.d_weight)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_who_knows_the_labels_need_not_have_them_looked_at(impl):
    problem = Problem(T=64, ignored=0.5)
    count = int((problem.labels != -100).sum())
    looked = problem.run(partial(linear_cross_entropy, impl=impl))
    settings = {"check_labels": False, "num_labeled": count, "impl": impl}
    known = problem.run(partial(linear_cross_entropy, **settings))
    assert max(known.errors(looked).values()) < 1e-14
    problem.labels[3] = problem.V
    wrong = problem.run(partial(linear_cross_entropy, impl=impl, check_labels=False))
    assert wrong.loss.isnan()


@pytest.mark.parametrize("of_teacher", ["logits", "hidden"])
@pytest.mark.parametrize(
    ("reduction", "dtype"), [("none", torch.float64), ("sum", torch.float16)]
)
def test_who_saves_tensors_elsewhere_may_reuse_their_memory(
    reduction, dtype, of_teacher
):
    """As the buffers of a micro-batch are, once its backward pass has been recorded."""
    problem = Problem(T=9, D=4, V=11, ignored=0)
    g = torch.Generator().manual_seed(0)
    teacher = {"logits": torch.randn(9, 11, generator=g).to(dtype)}
    if of_teacher == "hidden":
        shapes = {"hidden": (9, 3), "weight": (11, 3)}
        teacher = {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
    words = torch.randint(11, (9, 2), generator=g)
    head = HeadLoss([CrossEntropy(), Distillation(), Unlikelihood()])
    gradients = []
    for reused in (False, True):
        hidden = problem.hidden.to(dtype).requires_grad_()
        weight = problem.weight.to(dtype).requires_grad_()
        mine = {name: x.clone() for name, x in teacher.items()}
        candidates = words.clone()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
            loss = head(
                hidden,
                weight,
                problem.labels,
                teacher=Teacher(**mine),
                candidates=candidates,
                reduction=reduction,
            ).loss.sum()
        if reused:
            for x in (*mine.values(), candidates):
                x.zero_()
        gradients.append(torch.autograd.grad(loss, [hidden, weight]))
    for once, again in zip(*gradients, strict=True):
        assert torch.equal(once, again)


def test_autocast_leaves_float64_alone():
    problem = Problem()
    truth = problem.run(full_logits())
    with torch.autocast("cpu", torch.bfloat16):
        ours = problem.run(lambda *args: HeadLoss()(*args).loss)
    assert max(ours.errors(truth).values()) < 1e-12


@pytest.mark.parametrize("missing", ["triton", "torch"])
def test_without_triton_there_are_plain_sweeps(monkeypatch, missing):
    def no_import(name, *args):
        if name == "torchtitan_liger.head_loss.triton_sweeps":
            raise ImportError(name=missing)
        return real_import(name, *args)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_import)
    sweeps_for = passes.sweeps_for.__wrapped__
    if missing == "triton":
        assert sweeps_for("cuda") is torch_sweeps
    else:  # a triton that is there and broken
        with pytest.raises(ImportError):
            sweeps_for("cuda")
