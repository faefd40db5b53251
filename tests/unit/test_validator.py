from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import HAS_GPU
from torchtitan_liger import device
from torchtitan_liger.head_loss import (
    CrossEntropy,
    HeadLoss,
    HeadLossOptions,
    PolicyGradient,
)
from torchtitan_liger.head_loss_plan import HeadLossPlan
from torchtitan_liger.lm_head import LMHead
from torchtitan_liger.validator import LigerValidator

V, D = 101, 16
DEVICE = "cuda" if HAS_GPU else "cpu"


class Decoder(nn.Module):
    """The least that a validator can validate."""

    def __init__(self, vocab_size: int = V) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, D)
        self.output = LMHead.from_linear(nn.Linear(D, vocab_size, bias=False))
        self.output.head_loss = HeadLoss()
        self.to(DEVICE)

    def forward(self, tokens, return_hidden_states):
        assert return_hidden_states
        assert not self.training
        return self.tok_embeddings(tokens)


class Loader:
    """At its end it stays there, as torchtitan's does, until a state is loaded."""

    def __init__(self, batches) -> None:
        self.batches = batches
        self.load_state_dict(None)

    def load_state_dict(self, _state) -> None:
        self.iterator = iter(self.batches)

    def __iter__(self):
        return self.iterator


PLAIN = HeadLossPlan("chunked", HeadLossOptions())


def validate(model, batches, steps=-1, plan=PLAIN, share=None, cp_enabled=False):
    """What a validator logs for these batches.

    Args:
        share: how many tokens of each sequence this rank has; None for all.
    """
    validator = LigerValidator.__new__(LigerValidator)
    validator.plan = plan
    logged = {}
    validator.job_config = SimpleNamespace(validation=SimpleNamespace(steps=steps))
    is_loader = isinstance(batches, Loader)
    validator.validation_dataloader = batches if is_loader else Loader(batches)
    validator.start = {}
    validator.metrics_processor = SimpleNamespace(
        ntokens_since_last_log=0, log_validation=lambda **kw: logged.update(kw)
    )
    validator.parallel_dims = SimpleNamespace(
        cp_enabled=cp_enabled, get_optional_mesh=lambda _: None
    )
    validator.post_dataloading_process = lambda inputs, labels, _: (
        inputs["input"][:, :share],
        labels[:, :share],
        {name: x for name, x in inputs.items() if name != "input"},
        {},
    )
    validator.validation_context = contextlib.nullcontext
    validator.maybe_enable_amp = contextlib.nullcontext()
    validator.validate([model], step=7)
    counted = validator.metrics_processor.ntokens_since_last_log
    return logged | {"tokens": counted} if share else logged


def batch(num_labels, seed=0, vocab_size=V):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (2, 8), generator=g)
    labels = torch.full((16,), -100)
    labels[:num_labels] = torch.randint(vocab_size, (num_labels,), generator=g)
    return {"input": tokens}, labels.view(2, 8)


def test_every_token_counts_the_same():
    model = Decoder().double().train()
    batches = [batch(1, seed=1), batch(9, seed=2)]
    logged = validate(model, batches)
    logits = [
        model.output(model.tok_embeddings(x["input"].to(DEVICE))).cpu()
        for x, _ in batches
    ]
    expected = F.cross_entropy(
        torch.cat([z.flatten(0, 1) for z in logits]),
        torch.cat([y.flatten() for _, y in batches]),
    )
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-13)
    assert logged["step"] == 7
    assert model.training
    assert model.output.num_fused_calls == 0


def test_no_more_batches_than_asked_for():
    model = Decoder()
    two = validate(model, (batch(5, seed) for seed in itertools.count()), steps=2)
    assert two == validate(model, [batch(5, 0), batch(5, 1)])


def test_a_batch_without_labels_adds_nothing(caplog):
    model = Decoder()
    alone = validate(model, [batch(5)])
    assert validate(model, [batch(5), batch(0)]) == alone
    assert validate(model, [batch(0)]) == {}
    assert "no token with a label" in caplog.text


def test_each_validation_on_all_data_has_all_of_it():
    model, loader = Decoder(), Loader([batch(5), batch(3)])
    assert validate(model, loader) == validate(model, loader) != {}


def test_a_label_that_is_no_word_is_an_error():
    inputs, labels = batch(5)
    labels[1, 2] = V
    with pytest.raises(ValueError, match=rf"labels\[1, 2\] is {V}"):
        validate(Decoder(), [(inputs, labels)])


@pytest.mark.skipif(HAS_GPU, reason="measures the memory of a process on the CPU")
def test_its_peak_memory_is_below_that_of_the_logits():
    vocab_size, length = 65536, 4096
    model = Decoder(vocab_size)
    tokens = torch.randint(vocab_size, (1, length))
    data = [({"input": tokens}, tokens)]
    validate(model, [batch(5)])  # warm up
    device.reset_peak_resident_bytes()
    before = device.peak_resident_bytes()
    validate(model, data)
    logits = length * vocab_size * 4
    assert device.peak_resident_bytes() - before < logits / 3


def test_validation_is_plain_cross_entropy_whatever_is_trained_on():
    model = Decoder()
    plain = validate(model, [batch(9)])
    terms = (CrossEntropy(0.1), PolicyGradient())
    model.output.head_loss = HeadLoss(terms)
    plan = HeadLossPlan("chunked", HeadLossOptions(), terms)
    assert validate(model, [batch(9)], plan=plan) == plain
    # What the terms read in training is kept from the decoder.
    inputs, labels = batch(9)
    inputs["advantages"] = inputs["old_logp"] = torch.zeros(2, 8)
    assert validate(model, [(inputs, labels)], plan=plan) == plain


def test_labels_are_counted_where_a_rank_knows_its_share_of_them():
    """As under context parallelism."""
    model, batches = Decoder(), [batch(14, 0), batch(11, 1)]
    mine = validate(model, batches, share=4, cp_enabled=True)
    shares = [({"input": x["input"][:, :4]}, y[:, :4]) for x, y in batches]
    assert mine == validate(model, shares) | {"tokens": 2 * 16}
