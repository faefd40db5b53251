"""What a call refuses, and what makes its loss NaN where nobody looks."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from tests.helpers import Problem
from torchtitan_liger.head_loss import (
    CrossEntropy,
    Distillation,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
    Teacher,
    VocabShard,
    functional,
    linear_cross_entropy,
)


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


@pytest.mark.parametrize("name", ["hidden", "weight", "labels"])
def test_a_tensor_on_another_device_is_an_error(name):
    args = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(7, 8),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match="must be on one device, got .*meta"):
        linear_cross_entropy(**args)


def test_a_row_on_another_device_is_an_error():
    problem = Problem(T=9, D=8, V=21)
    args = problem.hidden, problem.weight, problem.labels
    head = HeadLoss([PolicyGradient("reinforce")])
    with pytest.raises(ValueError, match=r"advantages must be like labels, .* on meta"):
        head(*args, advantages=torch.ones(9, device="meta"))


def test_autocast_leaves_no_weight_in_float64_beside_float32():
    args = torch.zeros(4, 8), torch.zeros(7, 8).double(), torch.zeros(4).long()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"float32 and weight is torch\.float64"),
    ):
        HeadLoss()(*args)


@pytest.mark.parametrize("shape", [(1, 257, 5), (257, 1, 5), (514, 5)])
def test_a_teacher_of_other_tokens_is_an_error(shape):
    problem = Problem(D=4, V=5)
    args = problem.hidden, problem.weight, problem.labels
    with pytest.raises(ValueError, match="teacher's logits must be"):
        HeadLoss([Distillation()])(*args, teacher=Teacher(logits=torch.zeros(shape)))


def test_a_teacher_has_one_dtype():
    problem = Problem(T=6, D=4, V=9)
    args = problem.hidden, problem.weight, problem.labels
    teacher = Teacher(hidden=torch.zeros(6, 4), weight=torch.zeros(9, 4).double())
    with pytest.raises(ValueError, match="teacher's hidden states are .*float32 and"):
        HeadLoss([Distillation()])(*args, teacher=teacher)


def test_a_narrow_label_is_not_a_far_ignored_index():
    """In 32 bits, it would be."""
    head = HeadLoss(options=HeadLossOptions(ignore_index=2**32 + 5))
    labels = torch.tensor([5, 0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"labels\[0\] is 5"):
        head(torch.ones(3, 4), torch.ones(5, 4), labels)
