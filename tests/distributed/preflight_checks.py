"""The preflight on two processes: it passes, and finds what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.distributed import matrix
from tests.distributed.layouts import FSDP, LAYOUTS, TP, Case

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
from torch.distributed.fsdp import FSDPModule  # isort: skip
from torch.distributed.tensor import DTensor, Replicate  # isort: skip
from torchtitan.protocols.model_converter import (  # isort: skip
    register_model_converter,
)
from torchtitan_liger import lm_head, preflight  # isort: skip
from torchtitan_liger.head_loss import (  # isort: skip
    HeadLoss,
    chunked,
    vocab_parallel,
)


def count(norm: Any, _args: Any) -> None:
    norm.calls.add_(1)


def preflight_passes() -> dict[str, Any]:
    """The line of each layout, and whether it left a trace."""
    lines = {}
    for name, case in LAYOUTS.items():
        trainer = matrix.build_trainer(case, fused=True)
        (model,) = trainer.model_parts
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        parameters = dict(model.named_parameters())
        state = torch.get_rng_state()
        model.norm.register_buffer("calls", torch.zeros((), device=trainer.device))
        model.norm.register_forward_pre_hook(count)
        buffers["norm.calls"] = torch.zeros((), device=trainer.device)
        lines[name] = str(run_preflight(trainer))
        assert torch.equal(torch.get_rng_state(), state)
        # The optimizer's own: none that FSDP has gathered.
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
        assert trainer.lm_head.num_fused_calls == 0
        assert model.training
        if isinstance(
            model, FSDPModule
        ):  # else the next pass waits for no other stream
            fsdp = model._get_fsdp_state()
            assert fsdp._state_ctx.iter_forward_root is None
            assert not fsdp._comm_ctx.post_forward_order
        trainer.close()
    return lines


def preflight_compiles_nothing() -> int:
    """How many graphs there are after the preflight of a compiled model."""
    case = Case("compiled", 2, f"{FSDP}=2 compile.enable")
    trainer = matrix.build_trainer(case, fused=True)
    torch._dynamo.utils.counters.clear()
    run_preflight(trainer)
    trainer.close()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def preflight_of_changed_logits() -> dict[str, str]:
    """What each layout says of a model that rules out the last token ids of its vocabulary."""
    said = {}

    def rule_out(_model: Any, _args: Any, logits: Any) -> Any:
        if logits.shape[-1] == matrix.VOCABULARY:
            part = logits.to_local() if isinstance(logits, DTensor) else logits
            if dist.get_rank() == dist.get_world_size() - 1:
                part[..., -3:] = -1e4
        return logits

    # Before whose training there can be no backward pass.
    early = Case("early step", 2, f"{FSDP}=2 optimizer.early_step_in_backward")
    for case in (LAYOUTS["FSDP2"], LAYOUTS["TP"], early):
        trainer = matrix.build_trainer(case, fused=True)
        trainer.model_parts[0].register_forward_hook(rule_out)
        try:
            said[case.name] = f"nothing: {trainer._preflight()}"
        except preflight.PreflightError as error:
            said[case.name] = str(error)
        trainer.close()
    return said


class FrozenHead:
    """A converter, as for adapters in a model that does not learn."""

    head, decoder = False, True

    def __init__(self, *_: Any) -> None:
        pass

    def convert(self, model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            learns = self.head if name == "output.weight" else self.decoder
            parameter.requires_grad_(learns)

    def post_optimizer_hook(self, *_: Any) -> None:
        pass


class FrozenDecoder(FrozenHead):
    head, decoder = True, False


def preflight_of_frozen_parts() -> dict[str, str]:
    """The line of each layout. What is frozen stays so."""
    lines = {}
    for kind in (FrozenHead, FrozenDecoder):
        register_model_converter(kind, kind.__name__)
        for options in (f"{TP}=2", f"{FSDP}=2"):
            options = f"{options} model.converters={kind.__name__}"
            trainer = matrix.build_trainer(Case("frozen", 2, options), fused=True)
            lines[options] = str(run_preflight(trainer))
            assert trainer.lm_head.weight.requires_grad is kind.head
            trainer.close()
    return lines


def ranks_of_two_minds() -> str:
    """What each rank says where one would have another implementation."""
    case = Case("unlike", 2, "liger_kernel.impl=chunked liger_kernel.impl=reference")
    options = case.options.split()[dist.get_rank()]
    try:
        matrix.build_trainer(case._replace(options=options), fused=True).close()
    except ValueError as error:
        return str(error)
    return "nothing"


def run_preflight(trainer: Any) -> preflight.PreflightReport:
    return preflight.check_head(
        trainer.model_parts[0],
        trainer.parallel_dims,
        trainer.post_dataloading_process,
        trainer.train_context,
        trainer.maybe_enable_amp,
        trainer.job_config.training.seq_len,
        trainer.device,
    )


@contextmanager
def weight_read_from_outside() -> Iterator[None]:
    """FSDP's hooks do not run: each rank keeps its own gradient."""

    real = lm_head.LMHead.__call__

    def call(
        self: lm_head.LMHead,
        hidden: Any,
        labels: Any = None,
        head_loss: Any = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return real(self, hidden)
        weight = self.weight
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        return head_loss(hidden, weight, labels, **kwargs)

    with mock.patch.object(lm_head.LMHead, "__call__", call):
        yield


@contextmanager
def shard_dropped() -> Iterator[None]:
    """The softmax runs over this rank's columns only."""
    real = vocab_parallel.combine

    def mine(names: Any, gathered_RkC: torch.Tensor) -> Any:
        rank = dist.get_rank()
        return real(names, gathered_RkC[rank : rank + 1])

    with mock.patch.object(vocab_parallel, "combine", mine):
        yield


@contextmanager
def hidden_gradient_not_summed() -> Iterator[None]:
    """Each rank takes its columns' share for the whole gradient of the hidden states."""

    def replicate(hidden: Any, *args: Any) -> Any:
        inputs = real(hidden, *args)
        local = hidden.redistribute(placements=[Replicate()]).to_local(
            grad_placements=[Replicate()]
        )
        return local, *inputs[1:]

    real = lm_head._local_inputs
    with mock.patch.object(lm_head, "_local_inputs", replicate):
        yield


@contextmanager
def gradient_scaled() -> Iterator[None]:
    """One percent too much."""
    real = chunked.scale_gradient
    with mock.patch.object(chunked, "scale_gradient", lambda *args: real(*args) * 1.01):
        yield


@contextmanager
def gradient_scaled_on_the_last_rank() -> Iterator[None]:
    """Of which the others have to hear."""
    if dist.get_rank() < dist.get_world_size() - 1:
        yield
        return
    with gradient_scaled():
        yield


@contextmanager
def normalizer_of_this_rank() -> Iterator[None]:
    """The mean over this rank's tokens instead of all."""
    real = HeadLoss.__call__

    def call(
        self: HeadLoss, hidden: Any, weight: Any, labels: Any, **kwargs: Any
    ) -> Any:
        kwargs["normalizer"] = (labels != -100).sum()
        return real(self, hidden, weight, labels, **kwargs)

    with mock.patch.object(HeadLoss, "__call__", call):
        yield


PLANTED = (
    ("FSDP2", weight_read_from_outside),
    ("FSDP2", gradient_scaled),
    ("FSDP2, bf16", gradient_scaled),
    ("FSDP2", normalizer_of_this_rank),
    ("DDP", gradient_scaled),
    ("TP", shard_dropped),
    ("TP", hidden_gradient_not_summed),
    ("TP", gradient_scaled),
    ("TP", gradient_scaled_on_the_last_rank),
)


def preflight_catches() -> dict[str, str]:
    """What the preflight says to each planted error."""
    said = {}
    for layout, error in PLANTED:
        trainer = matrix.build_trainer(LAYOUTS[layout], fused=True)
        with error():
            try:
                said[f"{layout}: {error.__name__}"] = str(run_preflight(trainer))
            except preflight.PreflightError as caught:
                said[f"{layout}: {error.__name__}"] = f"caught: {caught}"
        trainer.close()
    return said
