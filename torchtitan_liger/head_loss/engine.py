"""The public face of the engine: `HeadLoss` and `linear_cross_entropy`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from torchtitan_liger.head_loss.calls import Call, prepare
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
                tensor of one element on any device. Zero counts as one, so a batch
                without any label has loss 0 and gradients 0.
            shard: which columns `weight` holds, when the vocabulary is sharded. The
                gradient of `hidden` is then this rank's share of a sum over the group.
            check_labels: look for labels that are no words. This waits for the GPU, so
                callers that have looked on the host turn it off; such a label then makes
                the loss NaN.

        Raises:
            ValueError: for shapes, dtypes, labels or a normalizer that do not fit.
        """
        options = self.options
        call = prepare(
            hidden,
            weight,
            labels,
            normalizer=normalizer,
            vocab_size=weight.shape[0] if shard is None else shard.vocab_size,
            ignore_index=options.ignore_index,
            check_labels=check_labels,
        )
        if self.impl == "reference":
            if shard is not None:
                raise ValueError(
                    'impl="reference" needs the whole vocabulary on each rank; '
                    'use impl="chunked" for a sharded head'
                )
            return self._reference(call)

        num_columns, dim = weight.shape
        plan = self.plan(
            call.labels_T.numel(),
            dim,
            num_columns if shard is None else shard.widest,
            call.products_dtype,
            hidden.device.type,
        )
        loss, by_term = ChunkedHeadLoss.apply(
            call.hidden_TD,
            weight,
            ChunkedCall(
                terms=self.terms,
                options=options,
                labels_T=call.labels_T,
                scale=call.scale,
                products_dtype=call.products_dtype,
                tokens_per_chunk=plan.tokens_per_chunk,
                shard=shard,
                with_grad=torch.is_grad_enabled(),
            ),
        )
        names = [term.name for term in self.terms]
        return HeadLossOutput(loss, dict(zip(names, by_term.unbind(), strict=True)))

    def _reference(self, call: Call) -> HeadLossOutput:
        sums = reference_head_loss(
            call.hidden_TD, call.weight_vD, call.labels_T, self.options
        )
        values = {name: value * call.scale for name, value in sums.items()}
        loss = torch.stack([t.weight * values[t.name] for t in self.terms]).sum()
        return HeadLossOutput(loss, {k: v.detach() for k, v in values.items()})

    def plan(
        self,
        num_tokens: int,
        dim: int,
        num_columns: int,
        dtype: torch.dtype,
        device_type: str,
    ) -> ChunkPlan:
        """How a call with these sizes goes through its logits, and in which memory."""
        wide = torch.promote_types(dtype, torch.float32)
        # Logits in a narrow dtype have a float32 copy beside them during the sweeps, and
        # with a softcap there are the logits before and after it.
        num_bytes = wide.itemsize * (2 if self.options.logit_softcap else 1)
        num_bytes += 0 if wide == dtype else dtype.itemsize
        budget = budget_bytes(
            self.options.logits_memory_mib, device_type, num_columns * num_bytes
        )
        if (
            self.impl == "reference"
        ):  # autograd keeps the softmax, and needs its gradient
            num_bytes += 2 * wide.itemsize
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
        reduction: "mean" divides by the number of tokens with a label (and is 0, where
            torch's is NaN, if there is none).
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
