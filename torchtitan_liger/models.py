"""torchtitan's decoders, with `return_hidden_states` and our LM head."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.protocols import train_spec as torchtitan_specs
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.logging import logger

from torchtitan_liger import validator
from torchtitan_liger.cli import FLAG_OFF
from torchtitan_liger.config_validator import model_args, settings
from torchtitan_liger.data import build_text_dataloader
from torchtitan_liger.lm_head import CHANGES_LOGITS, LMHead, local_tensor
from torchtitan_liger.parallelize import parallelize

DECODERS = ("llama3", "llama4", "qwen3", "deepseek_v3", "gpt_oss")
"""The models of torchtitan that end in `output(norm(h))`."""

EXTRA_FLAVORS: dict[str, dict[str, BaseModelArgs]] = {
    "llama3": {
        # The head holds most of the parameters, as in a real small model.
        "debugmodel_16k": TransformerModelArgs(
            dim=256, n_layers=4, n_heads=8, vocab_size=16384, rope_theta=500000
        ),
        "1.2B": TransformerModelArgs(
            dim=2048,
            n_layers=12,
            n_heads=16,
            n_kv_heads=8,
            ffn_dim_multiplier=1.3,
            multiple_of=256,
            rope_theta=500000,
        ),
    },
}
"""Flavors that we add to torchtitan's."""


class _PassThrough(nn.Module):
    """In the place of a head: gives back what it gets, and remembers it."""

    hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        return hidden

    def equals(self, other: torch.Tensor) -> bool:
        """Whether it got these numbers, in whatever dtype."""
        if self.hidden is None or self.hidden.shape != other.shape:
            return False
        got, other = local_tensor(self.hidden), local_tensor(other)
        return torch.allclose(got.to(other.dtype), other, 0, 0, equal_nan=True)


class ReturnHiddenStates(nn.Module):
    """Mixin for a torchtitan decoder: `forward(..., return_hidden_states=True)`.

    The decoder's own forward runs in both cases. For hidden states the head is replaced
    by a pass-through for the time of the call, so none of its hooks run; what goes
    through has to be what comes out.
    """

    output: nn.Module
    model_args: Any

    def __init__(self, model_args: BaseModelArgs) -> None:
        super().__init__(model_args)
        head = self.output
        # Another head can train as it is; with the fused loss on, `parallelize` refuses it.
        if type(head) is nn.Linear and head.bias is None:
            head = LMHead.from_linear(head)
        self.output = head

    def forward(
        self, *args: Any, return_hidden_states: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """As the decoder's own; with `return_hidden_states` [B, L, D] instead of logits.

        Raises:
            ValueError: for a decoder that does to hidden states what it means for logits.
        """
        if not return_hidden_states:
            return super().forward(*args, **kwargs)
        head = self.output
        passed = self.output = _PassThrough()
        try:
            hidden: torch.Tensor = super().forward(*args, **kwargs)
        finally:
            self.output = head
        # Only a decoder that gives back another tensor has to wait for its numbers.
        if hidden is not passed.hidden and not passed.equals(hidden):
            raise ValueError(CHANGES_LOGITS)
        return hidden

    def get_attention_masks(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own; a TypeError where its attention takes none, by which
        torchtitan's validator knows. Some decoders would make a mask and then refuse it."""
        kind = getattr(self.model_args, "attn_type", "sdpa")
        if kind not in ("flex", "varlen"):
            raise TypeError(f"{kind} attention takes no masks")
        return super().get_attention_masks(*args, **kwargs)  # type: ignore[misc]


def with_hidden_states(decoder: type[nn.Module]) -> type[nn.Module]:
    """The class `decoder` with `return_hidden_states`; its output is an `LMHead`, unless it
    is another than a plain linear layer without bias."""
    return type(decoder.__name__, (ReturnHiddenStates, decoder), {})


def train_spec(name: str) -> torchtitan_specs.TrainSpec:
    """torchtitan's train spec of `name`, with our decoder, head and flavors.

    Raises:
        ValueError: for a model that is not one of `DECODERS`.
    """
    if name not in DECODERS:
        raise ValueError(
            f"model.name is {name!r}; this trainer has {', '.join(DECODERS)}, and what the "
            "module that --experimental.custom_import names registers"
        )
    stock = torchtitan_specs.get_train_spec(name)
    if issubclass(stock.model_cls, ReturnHiddenStates):  # registered before
        return stock
    return dataclasses.replace(
        stock,
        model_cls=with_hidden_states(stock.model_cls),
        model_args={**EXTRA_FLAVORS.get(name, {}), **stock.model_args},
        parallelize_fn=partial(parallelize, stock.parallelize_fn),
        build_tokenizer_fn=partial(_build_tokenizer, stock.build_tokenizer_fn),
        build_dataloader_fn=_build_dataloader,
        build_validator_fn=validator.build,
    )


def register(name: str) -> None:
    """Have torchtitan build `name` from `train_spec(name)`; a second call does nothing."""
    if name not in torchtitan_specs._extra_train_specs:
        torchtitan_specs.register_train_spec(name, train_spec(name))


def check_spec(name: str) -> None:
    """
    Raises:
        ValueError: for a registered train spec whose head cannot take the loss, or that has
            another loss.
    """
    spec = torchtitan_specs.get_train_spec(name)
    decoder, loss = spec.model_cls, spec.build_loss_fn
    if not issubclass(decoder, ReturnHiddenStates):
        raise ValueError(
            f"model.name is {name!r}, whose registered train spec has the model "
            f"{decoder.__module__}.{decoder.__qualname__}, which gives no hidden states: "
            "make the spec from that of torchtitan_liger.models.train_spec, or turn the "
            f"fused loss off ({FLAG_OFF})"
        )
    if loss is not build_cross_entropy_loss:
        raise ValueError(
            f"model.name is {name!r}, whose registered train spec has the loss of "
            f"{getattr(loss, '__qualname__', loss)}, which the head would not compute: say "
            f"it in [head_loss], or turn the fused loss off ({FLAG_OFF})"
        )


def _build_tokenizer(
    build: Callable[[JobConfig], BaseTokenizer], job_config: JobConfig
) -> BaseTokenizer:
    """
    Raises:
        ValueError: where there is no folder of a tokenizer.
    """
    path = job_config.model.hf_assets_path
    if not os.path.isdir(path):
        raise ValueError(
            f"model.hf_assets_path is {path!r}, which is no folder: give the one of the "
            "tokenizer (ours, of 16,384 token ids, is torchtitan_liger/assets/tokenizer)"
        )
    return build(job_config)


def _build_dataloader(
    *, tokenizer: BaseTokenizer, job_config: JobConfig, **kwargs: Any
) -> BaseDataLoader:
    # The first time that torchtitan has a tokenizer, and before it builds a model.
    check_vocabulary(job_config, tokenizer.get_vocab_size())
    return build_text_dataloader(tokenizer=tokenizer, job_config=job_config, **kwargs)


def check_vocabulary(job: JobConfig, tokenizer_size: int) -> None:
    """
    Raises:
        ValueError: when the tokenizer has more token ids than the model. Without the fused
            loss that is a warning: they may never come, and torchtitan trains.
    """
    vocab_size = model_args(job).vocab_size
    if tokenizer_size <= vocab_size:
        return
    found = (
        f"the tokenizer in model.hf_assets_path = {job.model.hf_assets_path!r} has "
        f"{tokenizer_size} token ids, but {job.model.name} {job.model.flavor} only "
        f"{vocab_size}: choose another model.flavor or another tokenizer"
    )
    if settings(job).enable_fused_linear_cross_entropy:
        raise ValueError(found)
    logger.warning(found)
