"""The public face of the engine: `HeadLoss` and `linear_cross_entropy`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from torchtitan_liger.head_loss.chunked import ChunkedCall, ChunkedHeadLoss
from torchtitan_liger.head_loss.chunking import ChunkPlan, budget_bytes, plan_chunks
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.reference import reference_head_loss
from torchtitan_liger.head_loss.terms import terms_of
from torchtitan_liger.head_loss.vocab_parallel import VocabShard

EngineImpl = Literal["chunked", "reference"]


class HeadLossOutput(NamedTuple):
    """What a head gives back."""

    loss: torch.Tensor  # [] float32 (float64 for float64 inputs), differentiable
    terms: dict[
        str, torch.Tensor
    ]  # each [] without gradient; loss = sum(weight * term)


class HeadLoss:
    """Loss of an LM head from hidden states: `head_loss(hidden, weight, labels)`.

    The same as

        logits = hidden @ weight.T
        loss = cross_entropy(logits.float(), labels, reduction="sum") / normalizer

    plus the terms that `options` asks for, without the logits of all tokens.
    """

    def __init__(
        self,
        options: HeadLossOptions | None = None,
        *,
        impl: EngineImpl = "chunked",
    ) -> None:
        """
        Raises:
            ValueError: for an `impl` that this engine does not have.
        """
        if impl not in ("chunked", "reference"):
            raise ValueError(f'impl must be "chunked" or "reference", got {impl!r}')
        self.options = HeadLossOptions() if options is None else options
        self.impl = impl
        self.terms = terms_of(self.options)

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        *,
        normalizer: torch.Tensor | float = 1,
        shard: VocabShard | None = None,
        check_labels: bool = True,
    ) -> HeadLossOutput:
        """
        Args:
            hidden: [..., D] hidden states.
            weight: [V, D] weight of the head; with `shard`, this rank's [v, D] of it.
            labels: [...] integer labels in [0, V) or `options.ignore_index`.
            normalizer: the loss is the sum over tokens divided by this: a number or a
                tensor on any device. Zero counts as one, so a batch without any label
                has loss 0 and gradients 0.
            shard: which columns `weight` holds, when the vocabulary is sharded. The
                gradient of `hidden` is then this rank's share of a sum over the group.
            check_labels: look for labels that are no words. This waits for the GPU, so
                callers that have looked on the host turn it off; such a label then makes
                the loss NaN.

        Raises:
            ValueError: for shapes, dtypes or labels that do not fit.
        """
        check_inputs(hidden, weight, labels)
        options = self.options
        vocab_size = weight.shape[0] if shard is None else shard.vocab_size
        if check_labels:
            check_label_range(labels, vocab_size, options.ignore_index)
        hidden_TD, labels_T = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        compute_dtype = products_dtype(hidden, weight)
        math_dtype = torch.promote_types(compute_dtype, torch.float32)
        scale = inverse(normalizer, math_dtype, hidden.device)

        if self.impl == "reference":
            if shard is not None:
                raise ValueError(
                    'impl="reference" needs the whole vocabulary on each rank; '
                    'use impl="chunked" for a sharded head'
                )
            sums = reference_head_loss(hidden_TD, weight, labels_T, options)
            values = {name: value * scale for name, value in sums.items()}
            weights = {term.name: term.weight for term in self.terms}
            loss = sum(
                (weights[name] * value for name, value in values.items()),
                start=torch.zeros((), dtype=math_dtype, device=hidden.device),
            )
            return HeadLossOutput(loss, {k: v.detach() for k, v in values.items()})

        valid_T = labels_T != options.ignore_index
        unusable_T = valid_T & ((labels_T < 0) | (labels_T >= vocab_size))
        row_weight_T = torch.where(valid_T, scale, scale.new_zeros(()))
        row_weight_T = row_weight_T.masked_fill(unusable_T, torch.nan)
        num_columns, dim = weight.shape
        plan = self.plan(
            labels_T.numel(), dim, num_columns, compute_dtype, hidden.device.type
        )
        call = ChunkedCall(
            terms=self.terms,
            options=options,
            tokens_per_chunk=plan.tokens_per_chunk,
            compute_dtype=compute_dtype,
            shard=shard,
            with_grad=torch.is_grad_enabled(),
        )
        loss, by_term = ChunkedHeadLoss.apply(
            hidden_TD, weight, labels_T, row_weight_T, call
        )
        names = [term.name for term in self.terms]
        return HeadLossOutput(loss, dict(zip(names, by_term.unbind(), strict=True)))

    def plan(
        self,
        num_tokens: int,
        dim: int,
        num_columns: int,
        dtype: torch.dtype,
        device_type: str,
    ) -> ChunkPlan:
        """How a call with these sizes goes through its logits, and in which memory."""
        # Logits in a narrow dtype have a float32 copy beside them during the sweeps.
        wide = torch.promote_types(dtype, torch.float32)
        num_bytes = wide.itemsize + (0 if wide == dtype else dtype.itemsize)
        if self.options.logit_softcap:
            num_bytes += wide.itemsize
        budget = budget_bytes(self.options.logits_memory_mib, device_type)
        if self.impl == "reference":
            budget = max(1, num_tokens) * num_columns * num_bytes
        return plan_chunks(
            num_tokens,
            num_columns,
            itemsize=dtype.itemsize,
            bytes_per_logit=num_bytes,
            budget=budget,
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
    impl: EngineImpl = "chunked",
    acc_dtype: torch.dtype = torch.float32,
    logits_memory_mib: int = 0,
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T` against `labels`, without the logits.

    Args:
        hidden: [..., D] hidden states.
        weight: [V, D] weight of the head.
        labels: [...] integer labels in [0, V) or `ignore_index`.
        reduction: "mean" divides by the number of tokens with a label.
        impl: "chunked", or "reference" for full logits.

    The other settings are the fields of `HeadLossOptions`.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        ValueError: for a value out of range, or for shapes, dtypes or labels that do not
            fit; the message holds what was got.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    options = HeadLossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        acc_dtype=acc_dtype,
        logits_memory_mib=logits_memory_mib,
    )
    normalizer = 1 if reduction == "sum" else (labels != ignore_index).sum()
    head_loss = HeadLoss(options, impl=impl)
    return head_loss(hidden, weight, labels, normalizer=normalizer).loss


def products_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype of `hidden @ weight.T`: the inputs' own, or autocast's.

    Raises:
        ValueError: for two dtypes outside autocast.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtypes = {hidden.dtype, weight.dtype}
        # autocast leaves float64 alone
        if torch.float64 not in dtypes:
            return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them, "
            "or call this under torch.autocast"
        )
    return hidden.dtype


def inverse(
    normalizer: torch.Tensor | float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`1 / normalizer` as a tensor [] on `device`; for zero, 1."""
    value = torch.as_tensor(normalizer, device=device).to(dtype)
    return torch.where(value == 0, 1.0, value).reciprocal()


def check_inputs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> None:
    """
    Raises:
        ValueError: where shapes, dtypes or devices do not fit.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is a DTensor; pass its local tensor, with "
                "`shard=VocabShard(...)` for a weight whose vocabulary is sharded"
            )
    if weight.ndim != 2:
        raise ValueError(f"weight must be [V, D], got {tuple(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [..., D] with the D of weight [V, D], got hidden "
            f"{tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            "labels must have the shape of hidden without its last dim, got labels "
            f"{tuple(labels.shape)} and hidden {tuple(hidden.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype in (torch.bool, torch.uint8):
        raise ValueError(f"labels must be signed integers, got {labels.dtype}")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            "hidden, weight and labels must be on one device, got "
            f"{hidden.device}, {weight.device} and {labels.device}"
        )


def check_label_range(labels: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """
    Raises:
        ValueError: for a label that is neither in [0, vocab_size) nor `ignore_index`;
            the message holds the first one's value and position.
    """
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if not bad.any():
        return
    position = tuple(bad.nonzero()[0].tolist())
    raise ValueError(
        f"labels[{', '.join(map(str, position))}] is {labels[position].item()}, which is "
        f"neither a word of the vocabulary, [0, {vocab_size}), nor ignore_index "
        f"({ignore_index}); {int(bad.sum())} of {labels.numel()} labels are like it"
    )
