"""The public face of the engine: `HeadLoss` and `linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from torchtitan_liger.head_loss.calls import Call, per_token, prepare
from torchtitan_liger.head_loss.chunked import (
    METRICS,
    ChunkedCall,
    ChunkedHeadLoss,
    ChunkedTokenLosses,
)
from torchtitan_liger.head_loss.chunking import ChunkPlan, budget_bytes, plan_chunks
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.reference import reference_head_loss
from torchtitan_liger.head_loss.terms import Term, check_terms, terms_of
from torchtitan_liger.head_loss.vocab_parallel import VocabShard

EngineImpl = Literal["chunked", "reference"]


class HeadLossOutput(NamedTuple):
    """What a head gives back. All but `loss` are without gradient."""

    loss: torch.Tensor
    """[] (with reduction "none" [...]) float32; float64 for float64 inputs."""
    terms: dict[str, torch.Tensor]
    """Each term before its weight, divided by the normalizer: loss = sum(weight * term).
    Empty with reduction "none"."""
    metrics: dict[str, torch.Tensor]
    """What the softmax gives for nothing, divided by the normalizer: `accuracy`,
    `max_prob`, and `entropy` if a term needs it. Only from impl "chunked"."""


class HeadLoss:
    """Losses of an LM head from hidden states: `head_loss(hidden, weight, labels)`.

    The same as

        logits = hidden @ weight.T
        loss = cross_entropy(logits.float(), labels, reduction="sum") / normalizer

    plus the other terms, without the logits of all tokens.
    """

    def __init__(
        self,
        terms: Sequence[Term] | None = None,
        options: HeadLossOptions | None = None,
        *,
        impl: EngineImpl = "chunked",
    ) -> None:
        """
        Args:
            terms: what is summed up; None for the terms that `options` describes.

        Raises:
            ValueError: for an `impl` that this engine does not have, or terms that
                contradict each other or `options`.
        """
        if impl not in ("chunked", "reference"):
            raise ValueError(f'impl must be "chunked" or "reference", got {impl!r}')
        self.options = HeadLossOptions() if options is None else options
        self.impl = impl
        if terms is not None:
            if self.options.label_smoothing or self.options.z_loss:
                raise ValueError(
                    "label_smoothing and z_loss of the options belong to the default "
                    "terms; with terms of your own give CrossEntropy(label_smoothing) "
                    "and ZLoss(weight) instead"
                )
            if impl == "reference":
                raise ValueError('impl="reference" has the default terms only')
        self.terms = terms_of(self.options) if terms is None else tuple(terms)
        check_terms(self.terms)

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        *,
        normalizer: torch.Tensor | float = 1,
        token_weights: torch.Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
        shard: VocabShard | None = None,
        check_labels: bool = True,
        **row_inputs: torch.Tensor,
    ) -> HeadLossOutput:
        """
        Args:
            hidden: [..., D] hidden states.
            weight: [V, D] weight of the head; with `shard`, this rank's [v, D] of it.
            labels: [...] integer labels in [0, V) or `options.ignore_index`.
            normalizer: the loss is the sum over tokens divided by this: a number or a
                tensor of one element on any device. Zero counts as one, so a batch
                without any label has loss 0 and gradients 0.
            token_weights: [...] factor of each token's loss, all terms alike; its
                gradient is exact.
            reduction: "none" gives [...] losses. Their gradients are exact for any
                incoming gradient, at the price of computing the logits twice.
            shard: which columns `weight` holds, when the vocabulary is sharded. The
                gradient of `hidden` is then this rank's share of a sum over the group.
            check_labels: look for labels that are no words. This waits for the GPU, so
                callers that have looked on the host turn it off; such a label then makes
                the loss NaN.
            row_inputs: [...] numbers for each token that a term asks for by name.

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
        if reduction not in ("sum", "none"):
            raise ValueError(f'reduction must be "sum" or "none", got {reduction!r}')
        rows = per_token(row_inputs, labels)
        if token_weights is not None:
            if reduction == "none":
                raise ValueError(
                    'token_weights multiply nothing with reduction="none": multiply the '
                    "losses"
                )
            (token_weights,) = per_token(
                {"token_weights": token_weights}, labels
            ).values()
        if self.impl == "reference":
            if shard is not None:
                raise ValueError(
                    'impl="reference" needs the whole vocabulary on each rank; '
                    'use impl="chunked" for a sharded head'
                )
            return self._reference(call, token_weights, labels.shape, reduction)

        num_columns, dim = weight.shape
        plan = self.plan(
            call.labels_T.numel(),
            dim,
            num_columns if shard is None else shard.widest,
            call.products_dtype,
            hidden.device.type,
        )
        chunked = ChunkedCall(
            terms=self.terms,
            options=options,
            labels_T=call.labels_T,
            rows=rows,
            scale=call.scale,
            products_dtype=call.products_dtype,
            tokens_per_chunk=plan.tokens_per_chunk,
            shard=shard,
            with_grad=torch.is_grad_enabled(),
        )
        if reduction == "none":
            losses_T = ChunkedTokenLosses.apply(call.hidden_TD, weight, chunked)
            return HeadLossOutput(losses_T.view(labels.shape), {}, {})
        loss, by_term, metrics = ChunkedHeadLoss.apply(
            call.hidden_TD, weight, token_weights, chunked
        )
        named = dict(zip(METRICS, (metrics * call.scale).unbind(), strict=True))
        if not any("entropy" in term.needs for term in self.terms):
            del named["entropy"]
        names = [term.name for term in self.terms]
        return HeadLossOutput(
            loss, dict(zip(names, by_term.unbind(), strict=True)), named
        )

    def _reference(
        self,
        call: Call,
        token_weights_T: torch.Tensor | None,
        shape: torch.Size,
        reduction: str,
    ) -> HeadLossOutput:
        by_token = reference_head_loss(
            call.hidden_TD, call.weight_vD, call.labels_T, self.options
        )
        weights = {term.name: term.weight for term in self.terms}
        if reduction == "none":
            losses_T = torch.stack([weights[n] * x for n, x in by_token.items()]).sum(0)
            return HeadLossOutput((losses_T * call.scale).view(shape), {}, {})
        valid_T = call.labels_T != self.options.ignore_index
        values = {}
        for name, losses_T in by_token.items():
            if token_weights_T is not None:
                losses_T = torch.where(valid_T, losses_T * token_weights_T, 0.0)
            values[name] = losses_T.sum() * call.scale
        loss = torch.stack([weights[n] * value for n, value in values.items()]).sum()
        return HeadLossOutput(loss, {n: x.detach() for n, x in values.items()}, {})

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
        # softcap and entropy take one more of the same size each.
        needs_entropy = any("entropy" in term.needs for term in self.terms)
        copies = 1 + bool(self.options.logit_softcap) + needs_entropy
        num_bytes = wide.itemsize * copies
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
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
    temperature: float = 1.0,
    token_weights: torch.Tensor | None = None,
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
            torch's is NaN, if there is none); "none" gives one loss per token, and
            computes the logits twice.
        token_weights: [...] factor of each token's loss, with an exact gradient.
        impl: "chunked", or "reference" for full logits.

    The other settings are the fields of `HeadLossOptions`.

    Returns:
        [], or [...] with reduction "none"; float32 (float64 for float64 inputs).

    Raises:
        ValueError: for a value out of range, or for shapes, dtypes or labels that do not
            fit; the message holds what was got.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f'reduction must be "mean", "sum" or "none", got {reduction!r}'
        )
    options = HeadLossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        temperature=temperature,
        acc_dtype=acc_dtype,
        logits_memory_mib=logits_memory_mib,
    )
    head_loss = HeadLoss(options=options, impl=impl)
    return head_loss(
        hidden,
        weight,
        labels,
        normalizer=(labels != ignore_index).sum() if reduction == "mean" else 1,
        token_weights=token_weights,
        reduction="none" if reduction == "none" else "sum",
    ).loss
