from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import Problem
from torchtitan_liger import lm_head
from torchtitan_liger.head_loss import (
    Distillation,
    HeadLoss,
    HeadLossOptions,
    VocabShard,
    ZLoss,
    linear_cross_entropy,
)
from torchtitan_liger.lm_head import LMHead, changes_logits


def test_from_linear_shares_the_weight_and_draws_no_random_numbers():
    linear = nn.Linear(8, 13, bias=False)
    state = torch.get_rng_state()
    head = LMHead.from_linear(linear)
    assert torch.equal(torch.get_rng_state(), state)
    assert head.weight is linear.weight
    assert head.state_dict().keys() == linear.state_dict().keys()


def test_without_labels_it_is_the_linear_layer():
    linear = nn.Linear(8, 13, bias=False)
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(LMHead.from_linear(linear)(hidden), linear(hidden))


def test_with_labels_it_is_the_loss_and_counts_its_calls():
    problem = Problem()
    linear = nn.Linear(48, 517, bias=False, dtype=torch.float64)
    linear.weight.data = problem.weight
    head = LMHead.from_linear(linear)
    head.head_loss = HeadLoss()
    out = head(problem.hidden, problem.labels, normalizer=3)
    expected = linear_cross_entropy(
        problem.hidden, problem.weight, problem.labels, reduction="sum"
    )
    assert out.loss.item() == pytest.approx(expected.item() / 3, rel=1e-14)
    assert head.num_fused_calls == 1
    head(problem.hidden)
    assert head.num_fused_calls == 1
    head.head_loss = HeadLoss(impl="reference")
    head(problem.hidden, problem.labels)
    assert head.num_fused_calls == 1


def test_labels_without_a_loss_say_what_to_set():
    head = LMHead.from_linear(nn.Linear(8, 13, bias=False))
    with pytest.raises(RuntimeError, match="enable_fused_linear_cross_entropy"):
        head(torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 13), nn.Identity(), nn.utils.weight_norm]
)
def test_a_head_that_is_no_plain_linear_layer_is_refused(layer):
    with pytest.raises(ValueError, match="only a plain torch.nn.Linear without bias"):
        LMHead.from_linear(layer)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_that_change_after_the_head_are_found(dtype, scale):
    head = LMHead.from_linear(nn.Linear(4, 7, bias=False, dtype=dtype))
    head.requires_grad_(False).weight.mul_(scale)
    hidden = torch.randn(1, 3, 4, dtype=dtype)
    assert not changes_logits(lambda: head(hidden), head)
    assert not changes_logits(lambda: head(hidden).float(), head)
    assert not changes_logits(lambda: head(hidden * torch.nan), head)
    for change in (
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits.mul_(2),
        lambda logits: logits.clamp(-50, 50),
        lambda logits: logits.clamp(min=-20),
        lambda logits: logits.clamp(max=20),
        lambda logits: logits[..., :1],
    ):
        assert changes_logits(lambda change=change: change(head(hidden)), head)
    assert changes_logits(lambda: hidden @ head.weight.t(), head)
    assert not head._forward_hooks


def test_a_shard_takes_its_columns_of_the_teachers_logits(monkeypatch):
    head, found = LMHead.from_linear(nn.Linear(4, 7, bias=False)), {}
    shard = VocabShard(7, 21, 7, None)

    def head_loss(hidden, weight, labels, **call):
        found.update(call)

    head_loss.impl, head_loss.options = "chunked", HeadLossOptions(temperature=2.0)
    monkeypatch.setattr(lm_head, "_local_inputs", lambda h, w, _: (h, w, shard))
    logits, labels = torch.randn(2, 3, 21), torch.zeros(2, 3, dtype=torch.long)
    hidden = torch.zeros(2, 3, 4)
    head(hidden, labels, head_loss=head_loss, teacher_logits=logits)
    assert torch.equal(found["teacher"].logits, logits[..., 7:14])
    assert found["teacher"].temperature == 2


@pytest.mark.parametrize("width", [6, 8])
def test_a_teacher_of_another_vocabulary_is_refused(width):
    head = LMHead.from_linear(nn.Linear(4, 7, bias=False))
    head.head_loss = HeadLoss([Distillation()])
    hidden, labels = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    message = rf"the 7 token ids of this model, got \[2, 3, {width}\]"
    with pytest.raises(ValueError, match=message):
        head(hidden, labels, teacher_logits=torch.randn(2, 3, width))


def test_who_has_its_teachers_logits_has_nothing_to_learn_at_any_temperature():
    head = LMHead.from_linear(nn.Linear(4, 7, bias=False))
    head.head_loss = HeadLoss([Distillation()], HeadLossOptions(temperature=3.0))
    hidden, labels = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    out = head(hidden, labels, teacher_logits=head(hidden))
    assert out.loss.abs() < 1e-5


def test_a_subclass_of_linear_is_no_plain_one():
    class Adapted(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"only a plain torch\.nn\.Linear"):
        LMHead.from_linear(Adapted(4, 7, bias=False))


def test_the_loss_of_a_call_comes_before_the_heads_own():
    head = LMHead.from_linear(nn.Linear(4, 7, bias=False))
    head.head_loss = HeadLoss([ZLoss(1.0)])
    args = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    assert head(*args).terms.keys() == {"z_loss"}
    assert head(*args, head_loss=HeadLoss()).terms.keys() == {"cross_entropy"}


def test_without_gradients_no_loss_of_training_is_counted():
    head = LMHead.from_linear(nn.Linear(4, 7, bias=False))
    head.head_loss = HeadLoss()
    with torch.no_grad():
        head(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
    assert head.num_fused_calls == 0
