"""A proof, before the first step, that the fused head is right on this very mesh.

A few tokens on each rank go through the decoder and the fused head, forward and backward,
exactly as in training. Their hidden states are then gathered, and the same loss and
gradients computed from full logits in float64, sharing no code with the engine but the
terms' own formulas. The error that may remain is the one that plain full logits have in
this job's dtype, times `MARGIN`.

Terms that read more from the batch than labels are left out; if nothing is left, the
cross entropy stands in for them.

`N` tokens with a label on all ranks, `n` on this one, `L` sequence, `D` width, `V`
vocabulary, `v` the columns whose gradient this rank holds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import ParallelDims

from torchtitan_liger.cli import FLAG_OFF
from torchtitan_liger.full_logits import Gradients, Sample, full_logits_gradients
from torchtitan_liger.head_loss import CrossEntropy, HeadLoss, SequenceTerm
from torchtitan_liger.head_loss.calls import products_dtype
from torchtitan_liger.head_loss_plan import inputs_of
from torchtitan_liger.liger_api import LigerHeadLoss
from torchtitan_liger.lm_head import (
    CHANGES_LOGITS,
    LMHead,
    changes_logits,
    local_tensor,
)

MARGIN = 2.0
# Sums in another order, in float32, where full logits happen to have no error at all.
FLOOR = 1e-5
# Tokens with a label, over all ranks: enough to tell 1 % of an error, cheap in float64.
MOST_LABELS = 512
LENGTH = 128

QUANTITIES = ("loss", "d_hidden", "d_weight")

PrepareBatch = Callable[
    [dict[str, torch.Tensor], torch.Tensor],
    tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]],
]


class PreflightError(RuntimeError):
    """The fused head computes something else than full logits on this mesh."""


@dataclass(frozen=True)
class PreflightReport:
    """What was compared, and how far it is from the truth."""

    layout: str
    impl: str
    dtype: torch.dtype
    errors: dict[str, float]
    """Relative errors of the fused loss and gradients against float64; without `d_weight`
    where the head is frozen."""
    bounds: dict[str, float]
    """The largest errors allowed: those of full logits in `dtype`, times `MARGIN`."""
    num_labels: int
    seconds: float
    left_out: tuple[str, ...] = ()
    """The terms that read more from the batch than labels."""

    @property
    def passed(self) -> bool:
        # NaN must not pass.
        return all(error <= self.bounds[name] for name, error in self.errors.items())

    def __str__(self) -> str:
        figures = ", ".join(
            f"{name} {error:.1e} (at most {self.bounds[name]:.1e})"
            for name, error in self.errors.items()
        )
        without = f" without {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"Preflight {'passed' if self.passed else 'FAILED'}: {self.impl} head in "
            f"{str(self.dtype).removeprefix('torch.')} on {self.layout}{without}, relative "
            f"errors against float64: {figures}; {self.num_labels} tokens, "
            f"{self.seconds:.2f} s"
        )


def check_head(
    model: nn.Module,
    parallel_dims: ParallelDims,
    prepare_batch: PrepareBatch,
    train_context: Callable[[], AbstractContextManager[None]],
    amp: AbstractContextManager[None],
    seq_len: int,
    device: torch.device,
    *,
    backward: bool = True,
) -> PreflightReport | None:
    """Compare the fused head of `model` with full logits, on this mesh and in its dtypes.

    Leaves gradients, buffers and random number generators as they were. Parameters must
    have no gradient yet.

    Args:
        model: parallelized and initialized, with an `LMHead` as `output`.
        prepare_batch: what a trainer does with a batch between data and model.
        train_context, amp: the contexts of a training step.
        seq_len: the longest sequence that the model is built for.
        backward: False only looks whether the model does more to logits than its head, and
            compares nothing.

    Raises:
        PreflightError: when the errors are larger than the bounds, or the model does more
            to logits than its head, or its decoder cannot do with tokens alone.
    """
    start = time.perf_counter()
    head = model.get_submodule("output")
    assert isinstance(head, LMHead)
    assert head.head_loss is not None
    head_loss, left_out = _without_batch_inputs(head.head_loss)
    calls = head.num_fused_calls
    tokens_1L, labels_1L = _draw_batch(
        head.out_features, parallel_dims, seq_len, device
    )
    with _no_trace(model, device):
        inputs, labels, extra_inputs, extra_kwargs = prepare_batch(
            {"input": tokens_1L}, labels_1L
        )
        decode = partial(model, inputs, **extra_inputs, **extra_kwargs)
        with torch.no_grad(), train_context(), amp:
            _check_output(decode, head, device)
    if not backward:
        return None
    # Anew: FSDP has left the head's weight gathered, and the next pass has to gather it.
    with _no_trace(model, device):
        fused, sample = _fused_step(
            model,
            head,
            head_loss,
            decode,
            labels,
            parallel_dims,
            train_context,
            amp,
            device,
        )
        weight_VD = _full(head.weight.detach()).to(device)  # it may be offloaded
        columns = _columns(head.weight)
    head.num_fused_calls = calls
    truth = full_logits_gradients(sample, weight_VD, columns, head_loss, torch.float64)
    stock = full_logits_gradients(sample, weight_VD, columns, head_loss, sample.dtype)
    # torchtitan's data parallelism by replicas alone averages what are sums.
    replicas = parallel_dims.dp_replicate if not parallel_dims.fsdp_enabled else 1
    fused = fused._replace(d_weight=fused.d_weight * replicas)

    # FSDP keeps a gradient in its parameter's dtype.
    stock = stock._replace(d_weight=stock.d_weight.to(fused.d_weight.dtype))

    errors, bounds = _relative_errors([fused, stock], truth)
    if not head.weight.requires_grad:
        del errors["d_weight"]
    report = PreflightReport(
        layout=_layout(parallel_dims),
        impl=head_loss.impl,
        dtype=sample.dtype,
        errors=errors,
        bounds={name: MARGIN * error + FLOOR for name, error in bounds.items()},
        num_labels=len(sample.labels_N),
        seconds=time.perf_counter() - start,
        left_out=left_out,
    )
    if not report.passed:
        raise PreflightError(
            f"{report}. Training would go wrong in silence; train with {FLAG_OFF} and "
            "report this line. (--liger_kernel.no-preflight skips the check.)"
        )
    return report


def _without_batch_inputs(
    head_loss: HeadLoss | LigerHeadLoss,
) -> tuple[HeadLoss | LigerHeadLoss, tuple[str, ...]]:
    """A loss of labels alone, and the names of the terms that are missing from it."""
    left_out = [
        term
        for term in head_loss.terms
        if inputs_of(term) or isinstance(term, SequenceTerm)
    ]
    if not left_out:
        return head_loss, ()
    kept = [term for term in head_loss.terms if term not in left_out and term.weight]
    alone = HeadLoss(kept or [CrossEntropy()], head_loss.options)
    return alone, tuple(term.name for term in left_out)


def _fused_step(
    model: nn.Module,
    head: LMHead,
    head_loss: HeadLoss | LigerHeadLoss,
    decode: Callable[..., torch.Tensor],
    labels: torch.Tensor,
    dims: ParallelDims,
    train_context: Callable[[], AbstractContextManager[None]],
    amp: AbstractContextManager[None],
    device: torch.device,
) -> tuple[Gradients, Sample]:
    """One step of training on a few tokens, and what went into its head."""
    num_labels = _gather((labels != IGNORE_INDEX).sum()[None], dims)
    total = sum(int(n) for n in num_labels)
    with train_context():
        with amp:
            decoded = hidden = decode(return_hidden_states=True)
            tied = head.weight is model.get_submodule("tok_embeddings").weight
            if tied or not hidden.requires_grad:  # as of a frozen decoder
                # Only the head's share of the gradient is to be compared.
                hidden = hidden.detach().requires_grad_()
            hidden.retain_grad()
            loss = head(hidden, labels, head_loss=head_loss, normalizer=total).loss
            # FSDP may have sharded the head's weight again, in another dtype.
            dtype = products_dtype(hidden, hidden)
        loss.backward()
        if tied and decoded.requires_grad:
            # FSDP's step ends with the backward pass of the model that began it.
            torch.autograd.grad(decoded.sum(), decoded)
    assert hidden.grad is not None
    d_weight = head.weight.grad
    if d_weight is None:  # which is frozen
        d_weight = torch.zeros_like(head.weight)
    valid = labels != IGNORE_INDEX
    mine_nD = _full(hidden.detach())[valid]
    sample = Sample(
        hidden_ND=torch.cat(_gather(mine_nD, dims)),
        labels_N=torch.cat(_gather(labels[valid], dims)),
        mine=_slice_of_this_rank(num_labels, dims),
        dtype=dtype if dtype in (torch.bfloat16, torch.float16) else hidden.dtype,
    )
    fused = Gradients(
        loss=torch.stack(_gather(loss.detach()[None], dims)).sum(),
        d_hidden=_full(hidden.grad)[valid],
        d_weight=local_tensor(d_weight).to(device, copy=True),
    )
    return fused, sample


def _check_output(
    decode: Callable[[], torch.Tensor], head: LMHead, device: torch.device
) -> None:
    """
    Raises:
        PreflightError: on all ranks, where on one of them the model changes its logits; for
            a decoder that wants more than tokens.
    """
    try:
        changes = changes_logits(decode, head)
    except TypeError as error:
        if "missing" not in str(error):
            raise
        raise PreflightError(
            f"the decoder wants more of the batch than tokens, with which alone it fails: "
            f"{error}. Leave out the check before the first step "
            "(--liger_kernel.no-preflight)"
        ) from error
    anywhere = torch.tensor(float(changes), device=device)
    if dist.is_initialized():
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    if anywhere:
        raise PreflightError(CHANGES_LOGITS)


def _draw_batch(
    vocab_size: int, dims: ParallelDims, seq_len: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [1, L]: others on each data-parallel rank, few with a label."""
    rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
    ranks = dims.dp_replicate * dims.dp_shard
    divisor = dims.seq_len_divisor
    length = min(-(-LENGTH // divisor) * divisor, seq_len)
    g = torch.Generator().manual_seed(rank)
    tokens_1L = torch.randint(vocab_size, (1, length), generator=g)
    labels_1L = torch.randint(vocab_size, (1, length), generator=g)
    # Other numbers of labels on each rank, and none at all on the last of many.
    count = min(length // 2, MOST_LABELS // ranks) // (1 + rank % 3)
    if rank == ranks - 1 > 1:
        count = 0
    elif rank == 0:
        count = max(1, count)
    ignored = torch.randperm(length, generator=g)[count:]
    labels_1L[0, ignored] = IGNORE_INDEX
    return tokens_1L.to(device), labels_1L.to(device)


def _relative_errors(
    candidates: list[Gradients], truth: Gradients
) -> list[dict[str, float]]:
    """For each candidate, over all ranks: norm of the difference / norm of the truth."""
    zero = Gradients(*(torch.zeros_like(t) for t in truth))
    squares = [
        (x.double() - t.double()).square().sum()
        for candidate in (zero, *candidates)
        for x, t in zip(candidate, truth, strict=True)
    ]
    sums = torch.stack(squares)
    if dist.is_initialized():
        dist.all_reduce(sums)
    norm, *rest = sums.sqrt().view(-1, len(QUANTITIES)).tolist()
    return [
        {
            name: e / n if n else e
            for name, e, n in zip(QUANTITIES, row, norm, strict=True)
        }
        for row in rest
    ]


def _columns(weight: torch.Tensor) -> slice:
    """The rows of the full weight whose gradient this rank holds."""
    if not isinstance(weight, DTensor):
        return slice(0, weight.shape[0])
    assert all(not isinstance(p, Shard) or p.dim == 0 for p in weight.placements)
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return slice(offset[0], offset[0] + shape[0])


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gather(tensor: torch.Tensor, dims: ParallelDims) -> list[torch.Tensor]:
    """The tensors of all ranks that see other tokens; their first dims may differ."""
    mesh = dims.get_optional_mesh("loss")
    if mesh is None:
        return [tensor]
    gathered = [tensor] * mesh.size()
    dist.all_gather_object(gathered, tensor.cpu(), group=mesh.get_group())
    return [x.to(tensor.device) for x in gathered]


def _slice_of_this_rank(num_labels: list[torch.Tensor], dims: ParallelDims) -> slice:
    mesh = dims.get_optional_mesh("loss")
    rank = 0 if mesh is None else mesh.get_local_rank()
    before = sum(int(n) for n in num_labels[:rank])
    return slice(before, before + int(num_labels[rank]))


@contextlib.contextmanager
def _no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers and random number generators, remove gradients, shard parameters.

    Eager, so that a small batch leaves no trace in what compiled code specializes on.
    """
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = [] if device.type == "cpu" else [device]
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices, device_type=device.type),
        ):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A checkpoint is loaded into what the optimizer has. Where a tied head's
                # backward pass ends at the hidden states, FSDP shards no block again.
                module.reshard()
        for parameter in model.parameters():
            parameter.grad = None


def _layout(dims: ParallelDims) -> str:
    degrees = {
        "dp_replicate": dims.dp_replicate,
        "dp_shard": dims.dp_shard,
        "cp": dims.cp,
        "tp": dims.tp,
        "ep": dims.ep,
    }
    used = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    return " x ".join(used) or "one device"
