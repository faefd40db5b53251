"""One training step on many layouts: fused against stock, and both against one process.

    torchrun --nproc_per_node 2 -m tests.distributed.matrix --output results.json

Every layout sees the same eight sequences, dealt out to its ranks and micro-batches:
other tokens on each, other numbers of labels, and some with none at all. Each runs in the
real trainer, from the same weights, and gives the loss, the norm and the whole gradient of
every parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from tests.distributed.layouts import BLOCKS_NEED_A_GPU, CASES, CP, TP, Case
from torchtitan_liger import device

DEVICE = device.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torchtitan.config import ConfigManager, JobConfig  # noqa: E402
from torchtitan.models.attention import FlexAttentionWrapper  # noqa: E402
from torchtitan.models.llama3.model.args import (  # noqa: E402
    TransformerModelArgs as Llama3Args,
)
from torchtitan.models.qwen3.model.args import Qwen3ModelArgs  # noqa: E402
from torchtitan.protocols.train_spec import register_train_spec  # noqa: E402

from torchtitan_liger import models  # noqa: E402
from torchtitan_liger.head_loss import engine  # noqa: E402
from torchtitan_liger.trainer import Batch, LigerTrainer  # noqa: E402

# Flex attention has no kernel for fewer than 128 tokens and as many heads as GPT-OSS has.
NUM_SEQUENCES, LENGTH = 8, 128
# No multiple of 2 or 4: the last vocabulary shard is shorter.
VOCABULARY = 1001
FLAG = "--liger_kernel.enable_fused_linear_cross_entropy"
CHUNKS = 3  # of the fused loss, in each micro-batch

QWEN3 = Qwen3ModelArgs(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=128,
    vocab_size=VOCABULARY,
)
TINY: dict[str, dict[str, Any]] = {
    "llama3": {
        "tiny": Llama3Args(dim=64, n_layers=2, n_heads=4, vocab_size=VOCABULARY)
    },
    "qwen3": {
        "tiny": QWEN3,
        "tiny_tied": dataclasses.replace(QWEN3, enable_weight_tying=True),
    },
}


class Collectives(TorchDispatchMode):
    """Counts the collectives that start while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            self.counts[name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


class Step(NamedTuple):
    """What a training step gives, on every rank the same."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    gradients: dict[str, torch.Tensor]
    collectives: dict[str, int] = {}  # noqa: RUF012

    def errors(self, truth: Step, factor: float = 1.0) -> dict[str, float]:
        """Relative errors, with gradients `factor` times the true ones."""
        grads = [(self.gradients[n], g * factor) for n, g in truth.gradients.items()]
        assert self.gradients.keys() == truth.gradients.keys()
        return {
            "loss": relative(self.loss, truth.loss),
            "grad_norm": relative(self.grad_norm, truth.grad_norm * factor),
            "head": relative(*self._head(truth, factor)),
            "worst parameter": max(relative(g, t) for g, t in grads),
        }

    def _head(self, truth: Step, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        tied = "output.weight" not in truth.gradients
        name = "tok_embeddings.weight" if tied else "output.weight"
        return self.gradients[name], truth.gradients[name] * factor


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = value.double().cpu(), truth.double().cpu()
    error = ((value - truth).norm() / truth.norm().clamp(min=1e-300)).item()
    return math.inf if math.isnan(error) else error  # `max` may pass over a NaN


def sequences(vocab_size: int, groups: int, silent_rank: bool) -> torch.Tensor:
    """Eight sequences of tokens and labels, [8, 2, LENGTH]; `groups` ranks share them."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (NUM_SEQUENCES, LENGTH + 1), generator=g)
    labels = tokens[:, 1:].clone()
    share = torch.linspace(0.0, 0.9, NUM_SEQUENCES)[:, None]  # of ignored labels
    labels[torch.rand(NUM_SEQUENCES, LENGTH, generator=g) < share] = -100
    labels[2:4] = -100  # all of them
    data = torch.stack([tokens[:, :-1], labels], dim=1)
    if silent_rank:
        # Dealt out as [micro-batch, rank, sequence].
        per_rank = data.unflatten(0, (2, groups, -1))
        per_rank[:, -1, :, 1] = -100
    return data


def micro_batches(
    data: torch.Tensor, count: int, rank: int, groups: int
) -> Iterator[Batch]:
    for batch in data.unflatten(0, (count, groups, -1))[:, rank]:
        yield {"input": batch[:, 0].clone()}, batch[:, 1].clone()


def build_job(case: Case, *, fused: bool) -> JobConfig:
    model, flavor = case.model.split(".")
    groups = data_groups(case)
    local_batch = NUM_SEQUENCES // case.micro_batches // groups
    options = [f"--{option}" for option in case.options.split()]
    return ConfigManager().parse_args(
        [
            "--job.custom_config_module=torchtitan_liger.job_config",
            f"--job.dump_folder={tempfile.gettempdir()}/matrix",
            "--model.hf_assets_path=.",
            f"--model.name={model}",
            f"--model.flavor={flavor}",
            f"--training.seq_len={LENGTH}",
            f"--training.local_batch_size={local_batch}",
            f"--training.global_batch_size={NUM_SEQUENCES}",
            f"--training.mixed_precision_param={case.dtype}",
            "--training.max_norm=1e30",
            "--optimizer.lr=0",
            "--metrics.log_freq=1",
            "--activation_checkpoint.mode=none",
            "--liger_kernel.impl=chunked",
            "--liger_kernel.fallback=error",
            *options,
            *([FLAG] if fused else []),
        ]
    )


def data_groups(case: Case) -> int:
    """How many ranks, or groups of them, see different data."""
    degrees = dict(o.split("=") for o in case.options.split() if "=" in o)
    return case.ranks // int(degrees.get(TP, 1)) // int(degrees.get(CP, 1))


def true_step(case: Case) -> Step:
    """The whole batch in one process, with plain logits and autograd, in float64."""
    model = build_model(case)
    double = case.model.startswith(("llama3", "qwen3"))
    model.double() if double else model.float()  # GPT-OSS has bfloat16 in it
    data = sequences(model.model_args.vocab_size, data_groups(case), case.silent_rank)
    kwargs = {}
    if case.model.startswith("gpt_oss"):  # its masks come from outside
        kwargs["attention_masks"] = model.get_attention_masks(
            data[:, 0].to(DEVICE), None
        )
    with contextlib.ExitStack() as stack:
        # Compiled, it has no kernel in float32 for every shape.
        stack.enter_context(
            mock.patch.object(
                FlexAttentionWrapper, "_compiled_flex_attn", flex_attention
            )
        )
        if double:  # the decoders go through float32 for their rotary embeddings
            stack.enter_context(
                mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
            )
        logits = model(data[:, 0].to(DEVICE), **kwargs)
    labels = data[:, 1].to(DEVICE)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss / (labels != -100).sum()
    loss.backward()
    grads = gradients(model, case)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    return Step(loss.detach(), norm, grads)


def build_model(case: Case) -> nn.Module:
    """A stock model on one device, with the weights that every layout starts from."""
    name, flavor = case.model.split(".")
    spec = models.train_spec(name)
    args = copy.deepcopy(spec.model_args[flavor])
    args.update_from_config(build_job(case, fused=False))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = spec.model_cls(args)
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device(DEVICE))
    # As large as after some training: at the start gradients of the head dwarf others.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def build_trainer(case: Case, *, fused: bool) -> LigerTrainer:
    """The real trainer on this layout, with the weights that every layout starts from."""
    weights = build_model(case).state_dict()
    trainer = LigerTrainer(build_job(case, fused=fused))
    load_full(trainer.model_parts[0], weights)
    return trainer


def run_step(
    case: Case, *, fused: bool, chunks: int = CHUNKS, count: bool = False
) -> Step:
    """One step of the real trainer on this layout; `count` its collectives.

    Compiled models cannot be counted.
    """
    collectives = Collectives()
    with chunked_in(chunks if fused else None):
        trainer = build_trainer(case, fused=fused)
        (model,) = trainer.model_parts
        if fused:
            trainer._preflight()  # as before the first step of a run
        logged: dict[str, float] = {}
        trainer.metrics_processor.log = (  # type: ignore[method-assign]
            lambda _step, loss, _max, norm, **_: logged.update(loss=loss, norm=norm)
        )
        trainer.step = 1
        dims = trainer.parallel_dims
        groups = data_groups(case)
        rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
        data = sequences(trainer.model_args.vocab_size, groups, case.silent_rank)
        batches = micro_batches(data, case.micro_batches, rank, groups)
        with collectives if count else contextlib.nullcontext():
            trainer.train_step(batches)
        calls = trainer.lm_head.num_fused_calls
        reference = "reference" in case.options
        assert calls == (case.micro_batches if fused and not reference else 0), calls
        grads = gradients(model, case)
        trainer.close()
    return Step(
        torch.tensor(logged["loss"]),
        torch.tensor(logged["norm"]),
        grads,
        dict(collectives.counts),
    )


def gradients(model: nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """Of all parameters, but those of blocks that only pass on what they get."""
    parameters = dict(model.named_parameters())
    if DEVICE == "cpu" and case.model.startswith(BLOCKS_NEED_A_GPU):
        parameters = {n: p for n, p in parameters.items() if "layers." not in n}
    return {plain_name(n): full(p.grad) for n, p in parameters.items()}


def plain_name(name: str) -> str:
    """Without the wrappers of checkpointing and compilation."""
    return re.sub(r"_checkpoint_wrapped_module\.|_orig_mod\.", "", name)


def full(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@torch.no_grad()
def load_full(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        value = weights[plain_name(name)].to(parameter.dtype)
        local = value
        if isinstance(parameter, DTensor):
            # Cut here: torch cannot scatter shards of shards of unequal size.
            mesh, placements = parameter.device_mesh, parameter.placements
            local = distribute_tensor(
                value.to(mesh.device_type), mesh, placements, src_data_rank=None
            )
        parameter.copy_(local)
        assert torch.equal(full(parameter).to(value.device), value), name


@contextlib.contextmanager
def chunked_in(count: int | None) -> Iterator[None]:
    """Have the engine cut every call into `count` chunks, the last one shorter."""
    if count is None:
        yield
        return

    def plan(num_tokens: int, *_: Any, **__: Any) -> engine.ChunkPlan:
        return engine.ChunkPlan(-(-num_tokens // count) + 1, count, 0, 0)

    with mock.patch.object(engine, "plan_chunks", plan):
        yield


def register_tiny_models() -> None:
    """Tiny models in torchtitan's registry, without data."""
    for name in models.DECODERS:
        spec = models.train_spec(name)
        small = {"vocab_size": VOCABULARY, "n_layers": 2}
        flavors = TINY.get(name) or {
            "tiny": dataclasses.replace(spec.model_args["debugmodel"], **small)
        }
        if DEVICE == "cpu" and name in BLOCKS_NEED_A_GPU:
            module = importlib.import_module(f"torchtitan.models.{name}.model.model")
            module.TransformerBlock.forward = lambda _self, hidden, *_, **__: hidden
            spec.model_cls.get_attention_masks = lambda *_, **__: None
        register_train_spec(
            name,
            dataclasses.replace(
                spec,
                model_args={**spec.model_args, **flavors},
                # Flex attention wants one, but does not use it.
                build_tokenizer_fn=lambda _job_config: object(),
                build_dataloader_fn=None,
            ),
        )


def measure(case: Case) -> dict[str, Any]:
    """Errors of the fused and of the stock step against one process."""
    start = time.perf_counter()
    truth = true_step(case)
    factor = eval(case.gradient_factor)  # a fraction, from the table above
    fused = run_step(case, fused=True)
    row = {
        "case": case.name,
        "ranks": case.ranks,
        "dtype": case.dtype,
        "options": case.options,
        "fused": fused.errors(truth, factor),
        "loss": fused.loss.item(),
    }
    if case.stock:
        stock = run_step(case, fused=False)
        row["stock"] = stock.errors(truth, factor)
        row["fused to stock"] = fused.errors(stock)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", default="", help="a part of the cases' names")
    args = parser.parse_args()
    register_tiny_models()
    world_size = int(os.environ["WORLD_SIZE"])
    if DEVICE == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend)
    rows = []
    for case in CASES:
        if case.ranks != world_size or (case.gpu and DEVICE == "cpu"):
            continue
        if args.only not in case.name:
            continue
        failure = None
        try:
            row = measure(case)
        except Exception as error:
            row = {"case": case.name, "error": f"{type(error).__name__}: {error}"}
            failure = error
        rows.append(row)
        if os.environ["RANK"] == "0":
            print(json.dumps(row), flush=True)
            with open(args.output, "w") as file:
                json.dump(rows, file, indent=1)
        if failure is not None and world_size > 1:
            raise failure  # the other ranks may wait in a collective
    dist.destroy_process_group()
    device.let_gloo_finish()


if __name__ == "__main__":
    main()
