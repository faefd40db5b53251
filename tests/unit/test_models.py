"""The five decoders: stock when asked for logits, hidden states when asked for those."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.components.validate import Validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import train_spec as torchtitan_specs
from torchtitan.protocols.train_spec import TrainSpec

from tests.conftest import HAS_GPU
from tests.distributed.layouts import BLOCKS_NEED_A_GPU
from torchtitan_liger.lm_head import LMHead
from torchtitan_liger.models import DECODERS, train_spec, with_hidden_states

DEVICE = "cuda" if HAS_GPU else "cpu"
LENGTH = 128 if HAS_GPU else 32  # a block of flex attention


def stock_spec(name: str) -> TrainSpec:
    return importlib.import_module(f"torchtitan.models.{name}").get_train_spec()


def build(name: str, *, ours: bool) -> nn.Module:
    """The debug model of `name`, in one layer, from one seed."""
    spec = train_spec(name) if ours else stock_spec(name)
    args = copy.deepcopy(spec.model_args["debugmodel"])
    args.n_layers = min(args.n_layers, 2)
    job = JobConfig()
    job.training.seq_len = LENGTH
    args.update_from_config(job)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = spec.model_cls(args)
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device(DEVICE))
    if not HAS_GPU and name in BLOCKS_NEED_A_GPU:
        for layer in model.layers.values():
            layer.forward = lambda hidden, *_, **__: hidden
    return model.eval()


def run(model: nn.Module, name: str, **kwargs: bool) -> torch.Tensor:
    tokens = torch.randint(
        model.model_args.vocab_size,
        (2, LENGTH),
        generator=torch.Generator().manual_seed(1),
    ).to(DEVICE)
    if name == "gpt_oss":  # its attention takes its masks from outside
        mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device=DEVICE
        )
        kwargs["attention_masks"] = {"basic_mask": mask, "sliding_window_mask": mask}
    with torch.no_grad(), autocast():
        return model(tokens, **kwargs)


def autocast() -> torch.autocast:
    """As in training on one device."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=HAS_GPU)


@pytest.mark.parametrize("name", DECODERS)
def test_stock_weights_keys_and_logits_bit_for_bit(name):
    stock, ours = build(name, ours=False), build(name, ours=True)
    stock_state, our_state = stock.state_dict(), ours.state_dict()
    assert list(our_state) == list(stock_state)
    for key, value in stock_state.items():
        assert torch.equal(our_state[key], value), key
    assert isinstance(ours.output, LMHead)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]
    assert torch.equal(run(ours, name), run(stock, name))


@pytest.mark.parametrize("name", DECODERS)
def test_hidden_states_are_what_the_head_gets(name):
    model = build(name, ours=True)
    seen = []
    model.output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = run(model, name)
    hidden = run(model, name, return_hidden_states=True)
    assert len(seen) == 1  # the head did not run the second time
    assert torch.equal(hidden, seen[0])
    with autocast():
        assert torch.equal(model.output(hidden), logits)


@pytest.mark.skipif(HAS_GPU, reason="a bad index kills the process on a GPU")
def test_the_head_is_back_after_a_forward_that_fails():
    model = build("llama3", ours=True)
    head = model.output
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 10**6, device=DEVICE), return_hidden_states=True)
    assert model.output is head


def test_llama_takes_sequences_longer_than_its_default():
    args = copy.deepcopy(train_spec("llama3").model_args["debugmodel_16k"])
    job = JobConfig()
    job.training.seq_len = 2 * args.max_seq_len
    args.update_from_config(job)
    with torch.device("meta"):
        model = train_spec("llama3").model_cls(args)
    assert model.freqs_cis.shape[0] == job.training.seq_len


def test_tied_weights_stay_tied():
    spec = train_spec("qwen3")
    args = copy.deepcopy(spec.model_args["0.6B"])
    args.n_layers = 1
    with torch.device("meta"):
        model = spec.model_cls(args)
    assert model.output.weight is model.tok_embeddings.weight


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("head", [nn.Linear(4, 8), OwnLinear(4, 8, bias=False)])
def test_another_head_stays_as_it_is(head):
    class Decoder(nn.Module):
        def __init__(self, args: object) -> None:
            super().__init__()
            self.output = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.output(hidden)

    model = with_hidden_states(Decoder)(None)
    hidden = torch.randn(2, 4)
    assert model.output is head
    assert torch.equal(model(hidden, return_hidden_states=True), hidden)
    assert torch.equal(model(hidden), head(hidden))


class Bounded(nn.Module):
    """Bounds its logits where the batch says so."""

    def __init__(self, args: object) -> None:
        super().__init__()
        self.output = nn.Linear(4, 8, bias=False)

    def forward(self, hidden: torch.Tensor, bound: float | None = None) -> torch.Tensor:
        logits = self.output(hidden)
        return logits.float() if bound is None else bound * (logits / bound).tanh()


def test_what_a_decoder_means_for_logits_is_not_done_to_hidden_states():
    model = with_hidden_states(Bounded)(None)
    hidden = torch.randn(2, 4)
    hidden[0, 0] = torch.nan
    narrow = hidden.bfloat16()
    got = model(narrow, return_hidden_states=True)
    torch.testing.assert_close(got, narrow.float(), rtol=0, atol=0, equal_nan=True)
    for bound in (0.5, 30.0):
        with pytest.raises(ValueError, match="changes the logits .* logit_softcap"):
            model(hidden, bound=bound, return_hidden_states=True)
    assert isinstance(model.output, LMHead)


@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
@pytest.mark.parametrize("name", DECODERS)
def test_validation_makes_masks_where_attention_takes_them(
    name, attention, monkeypatch
):
    decoder = stock_spec(name).model_cls
    monkeypatch.setattr(decoder, "get_attention_masks", lambda *_, **__: "masks")
    model = build(name, ours=True)
    model.model_args.attn_type = attention
    validator = SimpleNamespace(tokenizer=None, parallel_dims=ParallelDims)
    monkeypatch.setattr(ParallelDims, "cp_enabled", False)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    *_, found = Validator.post_dataloading_process(
        validator, {"input": tokens}, tokens, [model]
    )
    assert found == ({"attention_masks": "masks"} if attention != "sdpa" else {})


def test_a_flavor_of_ones_own_wins(monkeypatch):
    own = replace(train_spec("llama3").model_args["1.2B"], dim=64)
    monkeypatch.setattr(torchtitan_specs, "_extra_train_specs", {})
    monkeypatch.setitem(stock_spec("llama3").model_args, "1.2B", own)
    assert train_spec("llama3").model_args["1.2B"].dim == 64


def test_decoders_keep_their_names():
    stock = stock_spec("llama3").model_cls
    assert with_hidden_states(stock).__name__ == stock.__name__


def test_other_models_are_refused_by_name():
    with pytest.raises(ValueError, match="model.name is 'flux'.*llama3"):
        train_spec("flux")


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    job = JobConfig()
    job.model.hf_assets_path = str(tmp_path / "none")
    with pytest.raises(ValueError, match="model.hf_assets_path is .*none'.* no folder"):
        train_spec("llama3").build_tokenizer_fn(job)
