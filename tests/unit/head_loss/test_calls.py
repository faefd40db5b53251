"""What a call takes and refuses, and whose its gradients are."""

from __future__ import annotations

import builtins
import re
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

import torchtitan_liger.head_loss.sweeps as torch_sweeps
from tests.helpers import Problem, full_logits, plain_head, relative_error
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    HeadLoss,
    Teacher,
    Unlikelihood,
    VocabShard,
    chunking,
    functional,
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
@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (-1, "at least 0, got -1"),
        (float("inf"), "got inf"),
        (float("nan"), "got nan"),
        (torch.ones(257), r"shape \(257,\)"),
        (torch.ones((), requires_grad=True), "requires_grad=True"),
    ],
)
def test_a_normalizer_is_one_number(impl, normalizer, message):
    problem = Problem()
    with pytest.raises(ValueError, match=message):
        HeadLoss(impl=impl)(
            problem.hidden, problem.weight, problem.labels, normalizer=normalizer
        )


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_tensor_that_is_no_normalizer_makes_the_loss_nan(value):
    problem = Problem()
    normalizer = torch.tensor(value)
    out = HeadLoss()(
        problem.hidden, problem.weight, problem.labels, normalizer=normalizer
    )
    assert out.loss.isnan()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_normalizer_may_be_any_tensor_of_one_element(impl):
    problem = Problem()
    losses = [
        HeadLoss(impl=impl)(
            problem.hidden, problem.weight, problem.labels, normalizer=normalizer
        ).loss
        for normalizer in (7, Fraction(7), torch.tensor(7), torch.tensor([7.0]))
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


@pytest.mark.parametrize("label", [517, 10**9, -1, -101])
def test_a_label_that_is_no_token_id_is_an_error_with_value_and_position(label):
    problem = Problem()
    labels = problem.labels.clone()
    labels[11] = label
    with pytest.raises(ValueError, match=rf"labels\[11\] is {label}\b.*\[0, 517\)"):
        linear_cross_entropy(problem.hidden, problem.weight, labels)


def test_an_unchecked_label_that_is_no_token_id_makes_the_loss_nan():
    problem = Problem()
    problem.labels[11] = 517
    out = HeadLoss()(problem.hidden, problem.weight, problem.labels, check_labels=False)
    assert out.loss.isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 9)}, r"hidden \(4, 9\) and weight \(7, 8\)"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels \(5,\)"),
        ({"labels": torch.zeros(4)}, "int64 or int32, got torch.float32"),
        ({"labels": torch.zeros(4).to(torch.int16)}, "got torch.int16"),
        ({"weight": torch.zeros(8)}, r"weight must be \[V, D\], got \(8,\)"),
        ({"weight": torch.zeros(())}, r"weight must be \[V, D\], got \(\)"),
        ({"weight": torch.zeros(0, 8)}, r"no vocabulary: weight is \(0, 8\)"),
        ({"weight": [[0.0]]}, "weight must be a tensor, got .*list"),
        ({"token_weights": torch.full((4,), 1j)}, "must be a real .*complex64"),
        ({"hidden": torch.zeros(4, 8).bfloat16()}, "bfloat16 and weight is .*float32"),
        (
            {"hidden": torch.zeros(4, 8).long()},
            "hidden must be float64, .*got .*int64",
        ),
        (
            {"weight": torch.zeros(7, 8).char()},
            "weight must be float64, .*got .*int8",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    inputs = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(7, 8),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(inputs | change))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("z_loss", -1e-4),
        ("z_loss", float("nan")),
        ("z_loss", True),
        ("logit_softcap", -30.0),
        ("acc_dtype", torch.float16),
        ("logits_memory_mib", -1),
        ("logits_memory_mib", 0.5),
        ("impl", "liger"),
        ("reduction", "avg"),
        ("temperature", 0.0),
        ("temperature", True),
        ("ignore_index", -100.0),
        ("ignore_index", 2**63),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(setting, value):
    problem = Problem()
    with pytest.raises(ValueError, match=f"{setting}.*{value}"):
        linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels, **{setting: value}
        )


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


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("counted", [0, 50, 257])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_wrong_number_of_labels_is_an_error_or_makes_the_loss_nan(
    impl, reduction, counted
):
    problem = Problem()
    args = problem.hidden, problem.weight, problem.labels
    right = int((problem.labels != -100).sum())
    head = HeadLoss(impl=impl)
    wrong = {"reduction": reduction, "num_labeled": counted}
    with pytest.raises(
        ValueError, match=f"num_labeled is {counted}, but {right} labels"
    ):
        head(*args, **wrong)
    out = head(*args, **wrong, check_labels=False)
    assert out.loss.isnan().all()
    assert all(x.isnan() for x in out.metrics.values())


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


@pytest.mark.parametrize("elsewhere", ["logits", "hidden", "weight"])
def test_a_teacher_on_another_device_is_named(elsewhere):
    problem = Problem(T=6, D=4, V=9)
    shapes = {"hidden": (6, 4), "weight": (9, 4)}
    shapes = {"logits": (6, 9)} if elsewhere == "logits" else shapes
    teacher = {
        name: torch.zeros(shape, device="meta" if name == elsewhere else "cpu")
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match="teacher is on meta, and the labels on cpu"):
        HeadLoss([Distillation()])(
            problem.hidden, problem.weight, problem.labels, teacher=Teacher(**teacher)
        )


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_what_no_term_reads_is_an_error(impl):
    problem = Problem(T=6, D=4, V=9)
    args = problem.hidden, problem.weight, problem.labels
    with pytest.raises(ValueError, match="advantages is read by none of the terms"):
        HeadLoss(impl=impl)(*args, advantages=torch.ones(6))
    with pytest.raises(ValueError, match="no term that learns from it"):
        HeadLoss(impl=impl)(*args, teacher=Teacher(logits=torch.zeros(6, 9)))


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


@pytest.mark.parametrize(
    "normalizer", [None, "7", -1, float("nan"), float("inf"), (3,), 1j]
)
def test_a_normalizer_is_a_number(normalizer):
    problem = Problem(T=5)
    with pytest.raises(ValueError, match=re.escape(f"at least 0, got {normalizer!r}")):
        HeadLoss()(
            problem.hidden, problem.weight, problem.labels, normalizer=normalizer
        )


def test_tensors_are_looked_at_before_other_ranks_wait_for_them(monkeypatch):
    monkeypatch.setattr(functional, "shard_of", lambda *_: pytest.fail("a collective"))
    problem = Problem(T=5)
    for labels in (problem.labels[:3], problem.labels.float(), [1, 2]):
        with pytest.raises(ValueError, match="labels must"):
            linear_cross_entropy(
                problem.hidden, problem.weight, labels, tp_group=object()
            )


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


def test_no_more_labels_than_tokens():
    problem = Problem(T=5)
    with pytest.raises(ValueError, match=r"whole number in \[0, 5\], got 6"):
        HeadLoss()(problem.hidden, problem.weight, problem.labels, num_labeled=6)


@pytest.mark.parametrize(
    ("columns", "numbers"),
    [
        (11, (1, 11, 11)),  # beyond the last column
        (11, (-3, 11, 11)),
        (6, (0, 11, 5)),  # wider than the widest
        (6, (0, 11, 12)),
        (11, (0, 0, 11)),
        (6, (0.0, 11, 6)),
        (6, (0, 11.0, 6)),
    ],
)
def test_a_shard_that_the_weight_is_not_is_named(columns, numbers):
    hidden, labels = torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)
    shard = VocabShard(*numbers, group=object())
    with pytest.raises(
        ValueError, match=f"of {columns} rows is no VocabShard.start={numbers[0]},"
    ):
        HeadLoss()(hidden, torch.zeros(columns, 8), labels, shard=shard)


def test_a_shard_and_a_sharded_vocabulary_have_a_group():
    hidden, labels = torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)
    weight = torch.zeros(11, 8)
    with pytest.raises(ValueError, match="is no VocabShard.*group=None"):
        HeadLoss()(hidden, weight, labels, shard=VocabShard(0, 11, 11, None))
    with pytest.raises(ValueError, match=r"such as a mesh's get_group\(\), got 'tp'"):
        linear_cross_entropy(hidden, weight, labels, tp_group="tp")


def test_a_setting_given_to_a_call_is_sent_to_the_options():
    problem = Problem()
    args = problem.hidden, problem.weight, problem.labels
    with pytest.raises(ValueError, match="temperature is .*, but of HeadLossOptions;"):
        HeadLoss()(*args, temperature=2.0)


@pytest.mark.parametrize(
    "name", ["hidden", "weight", "labels", "token_weights", "normalizer", "teacher"]
)
def test_a_dtensor_is_named_with_what_to_give_instead(name):
    tensors = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(11, 8),
        "labels": torch.zeros(4, dtype=torch.long),
        "token_weights": torch.ones(4),
        "normalizer": torch.ones(()),
        "teacher": torch.zeros(4, 11),
    }
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors[name] = DTensor.from_local(tensors[name], mesh, [Replicate()])
        logits, head = (
            tensors.pop("teacher"),
            HeadLoss([CrossEntropy(), Distillation()]),
        )
        with pytest.raises(ValueError, match=f"{name}.* is a DTensor, .*full_tensor"):
            head(**tensors, teacher=Teacher(logits=logits))
    finally:
        dist.destroy_process_group()
