"""The public face of the engine: `HeadLoss`.

`T` tokens, `N` of them that count, `D` width, `V` vocabulary, `v` this rank's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from math import lcm
from typing import Any, Literal, NamedTuple

import torch

import torchtitan_liger.head_loss.custom_op as custom_op
from torchtitan_liger.head_loss.calls import (
    Call,
    check_candidates,
    kept_rows,
    masked,
    per_token,
    prepare,
    row_inputs_of,
)
from torchtitan_liger.head_loss.chunked import ChunkedHeadLoss
from torchtitan_liger.head_loss.chunking import (
    ChunkPlan,
    budget_bytes,
    plan_chunks,
)
from torchtitan_liger.head_loss.distillation import Teacher
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.passes import HeadCall
from torchtitan_liger.head_loss.reference import reference_head_loss
from torchtitan_liger.head_loss.sequences import Sequences, sequences_of
from torchtitan_liger.head_loss.statistics import OF_TEACHER
from torchtitan_liger.head_loss.terms import (
    CrossEntropy,
    SequenceTerm,
    Term,
    as_terms,
    check_terms,
    needs_of,
    plain_of,
)
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
    """What the statistics give for nothing: `nll` (-log p of the label; the exponential of its
    mean is the perplexity), `accuracy` (of a token 1 if no logit is larger than the
    label's, so also for one of several largest), `max_prob`, `entropy` if a term needs it,
    and what the terms report as `term/metric`; without token weights, divided by the
    normalizer, but for those that end in "/max" or "/min". From impl "chunked"; the others
    have `nll` alone, and not of a smoothed cross entropy."""


class HeadLoss:
    """Losses of an LM head from hidden states: `head_loss(hidden, weight, labels)`.

    The same as

        logits = hidden @ weight.T
        loss = cross_entropy(logits.float(), labels, reduction="sum") / normalizer

    plus the other terms, without the logits of all tokens.
    """

    def __init__(
        self,
        terms: Sequence[Term] = (CrossEntropy(),),
        options: HeadLossOptions | None = None,
        *,
        impl: EngineImpl = "chunked",
    ) -> None:
        """
        Args:
            terms: what is summed up.
            options: None for the defaults.
            impl: "chunked", or "reference" for full logits, which has `CrossEntropy()`
                alone, or with a `ZLoss` after it.

        Raises:
            ValueError: for terms that contradict each other, options or `impl`.
        """
        if impl not in ("chunked", "reference"):
            raise ValueError(f'impl must be "chunked" or "reference", got {impl!r}')
        self.options = HeadLossOptions() if options is None else options
        if not isinstance(self.options, HeadLossOptions):
            raise ValueError(f"options must be HeadLossOptions, got {options!r}")
        self.impl = impl
        self.terms = as_terms(terms)
        check_terms(self.terms)
        self._plain = plain_of(self.terms)
        if impl == "reference" and self._plain is None:
            raise ValueError(
                'impl="reference" has CrossEntropy(label_smoothing) and, after it, '
                f"ZLoss(weight) only, got {self.terms}"
            )
        self._recipe = custom_op.recipe_of(self.terms, self.options)
        inputs = frozenset[str]().union(*(term.inputs for term in self.terms))
        if inputs and (taken := inputs & signature(self.__call__).parameters.keys()):
            raise ValueError(
                f"a term reads the input {', '.join(sorted(taken))}, which is an argument "
                "of every call already: give it another name"
            )
        self._inputs = sorted(inputs)
        self._needs_teacher = bool(OF_TEACHER & needs_of(self.terms))
        self._sequence_terms = [t for t in self.terms if isinstance(t, SequenceTerm)]

    def __setattr__(self, name: str, value: Any) -> None:
        # What follows from terms and options is not computed again.
        if name in vars(self):
            raise AttributeError(f"a HeadLoss keeps its {name}: make another HeadLoss")
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of a copy, which may be in another process.
        recipe = custom_op.recipe_of(state["terms"], state["options"])
        vars(self).update(state, _recipe=recipe)

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
        teacher: Teacher | None = None,
        sequence_ids: torch.Tensor | None = None,
        num_sequences: int | None = None,
        check_labels: bool = True,
        num_labeled: int | Sequence[int] | None = None,
        **row_inputs: torch.Tensor,
    ) -> HeadLossOutput:
        """
        Args:
            hidden: [..., D] hidden states, floating point, on any device.
            weight: [V, D] weight of the head, of the same dtype (under autocast of any);
                with `shard`, this rank's [v, D] of it.
            labels: [...] int64 or int32 labels in [0, V) or `options.ignore_index`.
            normalizer: the loss is the sum over tokens divided by this: a number or a
                tensor of one element on any device. Zero counts as one, so a batch
                without any label has loss 0 and gradients 0.
            token_weights: [...] factor of each token's loss, all terms alike, with an
                exact gradient. Tokens of weight 0 are computed, and count in the metrics.
            reduction: "none" gives [...] losses, and neither terms nor metrics. Their
                gradients are exact for any incoming gradient, at the price of computing
                the logits twice. Not with token weights or terms over sequences.
            shard: which columns `weight` holds, when the vocabulary is sharded. The
                gradient of `hidden` is then this rank's share of a sum over the group.
            teacher: the other model, for a distillation.
            sequence_ids: [...] int64 or int32 in [0, num_sequences): which tokens belong
                together. None: the last dim of `labels` is a sequence.
            num_sequences: how many `sequence_ids` number; they come together.
            check_labels: look for labels that are not in [0, V). This waits for the GPU, so
                callers that have looked on the host turn it off; such a label, or a token
                of no sequence, then makes the loss NaN.
            num_labeled: how many labels are not ignored, or how many in each row of
                `labels`, from a caller that knows. The other tokens then cost neither
                time nor memory; without it they do on a GPU with `check_labels=False`,
                and under torch.compile. A wrong number is refused as a wrong label is.
            row_inputs: [...] numbers for each token that a term asks for by name, without
                gradient; `candidates` is [..., K] int64 or int32.

        Raises:
            ValueError: for shapes, dtypes, labels, inputs or a normalizer that do not
                fit.
            RuntimeError: in the backward pass, for `create_graph=True`.
        """
        if reduction not in ("sum", "none"):
            raise ValueError(f'reduction must be "sum" or "none", got {reduction!r}')
        call = prepare(
            hidden,
            weight,
            labels,
            normalizer=normalizer,
            ignore_index=self.options.ignore_index,
            check_labels=check_labels,
            shard=shard,
        )
        if token_weights is not None:
            if reduction == "none":
                raise ValueError(
                    'token_weights multiply nothing with reduction="none": multiply the '
                    "losses"
                )
            token_weights = per_token("token_weights", token_weights, labels)
        if reduction == "none" and self._sequence_terms:
            raise ValueError(
                'reduction="none" has no gradients for terms over sequences: give '
                "token_weights instead"
            )
        rows = row_inputs_of(row_inputs, self._inputs, labels, call.scale.dtype)
        if "candidates" in self._inputs:
            call = check_candidates(call, rows["candidates"], check_labels)
        sequences = None
        if self._sequence_terms:
            call, sequences = sequences_of(
                call, labels, sequence_ids, num_sequences, check_labels
            )
        elif sequence_ids is not None or num_sequences is not None:
            raise ValueError("there are sequence_ids, but no term over sequences")
        if (teacher is not None) != self._needs_teacher:
            names = [t.name for t in self.terms if t.needs & OF_TEACHER]
            raise ValueError(
                f"the terms {', '.join(names)} need teacher=Teacher(...)"
                if teacher is None
                else "there is a teacher, but no term that learns from it"
            )
        if teacher is not None:
            if not isinstance(teacher, Teacher):
                raise ValueError(f"teacher must be a Teacher, got {type(teacher)}")
            teacher = teacher.flat(labels, weight.shape[0])

        kept_N, call, all_labeled = kept_rows(call, check_labels, num_labeled)
        if self.impl == "reference":
            if shard is not None:
                raise ValueError(
                    'impl="reference" needs the whole vocabulary on each rank; '
                    'use impl="chunked" for a sharded head'
                )
            return self._reference(call, weight, token_weights, labels.shape, reduction)

        labels_N, valid_N = call.labels_T, call.valid_T
        if kept_N is not None:
            labels_N, valid_N = labels_N[kept_N], valid_N[kept_N]
            rows = {name: x[kept_N] for name, x in rows.items()}
            if token_weights is not None:
                token_weights = token_weights[kept_N]
            if sequences is not None:
                sequences = sequences.kept(kept_N, num_labeled, check_labels)
        # What an ignored row holds must not reach the others of its sequence.
        rows = {name: masked(x, valid_N) for name, x in rows.items()}

        plan, sequences = self._schedule(
            labels_N.numel(), weight, call.products_dtype, shard, sequences, teacher
        )
        head_call = HeadCall(
            terms=self.terms,
            metrics=self._recipe.metrics,
            options=self.options,
            labels_N=labels_N,
            rows=rows,
            kept_N=kept_N,
            all_labeled=all_labeled,
            teacher=teacher,
            sequences=sequences,
            scale=call.scale,
            products_dtype=call.products_dtype,
            tokens_per_chunk=plan.tokens_per_chunk,
            shard=shard,
            with_grad=torch.is_grad_enabled(),
            by_token=reduction == "none",
        )
        if reduction == "none":
            losses_N, *_ = custom_op.apply_eagerly(
                ChunkedHeadLoss, call.hidden_TD, weight, None, head_call
            )
            losses_T = losses_N
            if kept_N is not None:
                # NaN if there are other labels than the caller has counted.
                zeros_T = torch.zeros_like(call.labels_T, dtype=call.scale.dtype)
                losses_T = (zeros_T * call.scale).index_copy(0, kept_N, losses_N)
            return HeadLossOutput(losses_T.view(labels.shape), {}, {})
        if torch.compiler.is_compiling() and custom_op.fits(head_call):
            loss, by_term, metrics = custom_op.apply(
                call.hidden_TD, weight, token_weights, head_call, self._recipe
            )
        else:
            loss, by_term, metrics = custom_op.apply_eagerly(
                ChunkedHeadLoss, call.hidden_TD, weight, token_weights, head_call
            )
        names = [term.name for term in self.terms]
        return HeadLossOutput(
            loss,
            dict(zip(names, by_term.unbind(), strict=True)),
            self._recipe.metrics.named(metrics, call.scale),
        )

    def _schedule(
        self,
        num_tokens: int,
        weight: torch.Tensor,
        dtype: torch.dtype,
        shard: VocabShard | None,
        sequences: Sequences | None,
        teacher: Teacher | None,
    ) -> tuple[ChunkPlan, Sequences | None]:
        """The chunks, and how they cut the sequences."""
        num_columns = weight.shape[0] if shard is None else shard.widest
        plan = self.plan(
            num_tokens,
            weight.shape[1],
            num_columns,
            dtype,
            weight.device.type,
            sharded=shard is not None,
            teacher_dtype=None if teacher is None else teacher.dtype,
        )
        groups = [t.sequences_per_group for t in self._sequence_terms if t.weight]
        if sequences is None or plan.num_chunks <= 1 or not groups or None in groups:
            return plan, sequences
        per_group = lcm(*(group or 1 for group in groups))
        return sequences.cut(plan, per_group) or (plan, sequences)

    def _reference(
        self,
        call: Call,
        weight_VD: torch.Tensor,
        token_weights_T: torch.Tensor | None,
        shape: torch.Size,
        reduction: str,
    ) -> HeadLossOutput:
        assert self._plain is not None
        by_token = reference_head_loss(
            call.hidden_TD, weight_VD, call.labels_T, self.options, *self._plain
        )
        weights = {term.name: term.weight for term in self.terms}
        if reduction == "none":
            losses_T = torch.stack([weights[n] * x for n, x in by_token.items()]).sum(0)
            return HeadLossOutput((losses_T * call.scale).view(shape), {}, {})
        nll = by_token["cross_entropy"].detach().sum() * call.scale
        values = {}
        for name, losses_T in by_token.items():
            if token_weights_T is not None:
                weights_T = token_weights_T.to(losses_T.dtype)
                losses_T = torch.where(call.valid_T, losses_T * weights_T, 0.0)
            values[name] = losses_T.sum() * call.scale
        loss = torch.stack([weights[n] * value for n, value in values.items()]).sum()
        values = {name: value.detach() for name, value in values.items()}
        return HeadLossOutput(loss, values, {} if self._plain[0] else {"nll": nll})

    def plan(
        self,
        num_tokens: int,
        dim: int,
        num_columns: int,
        dtype: torch.dtype,
        device_type: str,
        *,
        sharded: bool = False,
        teacher_dtype: torch.dtype | None = None,
    ) -> ChunkPlan:
        """How a call with these sizes goes through its logits, and in which memory.

        Args:
            dim: no matter here, but to `LigerHeadLoss.plan`.
            num_columns: of the rank with most of the vocabulary.
            dtype: of the products.
            device_type: "cpu" or "cuda": their defaults differ.
            sharded: whether there are columns on other ranks.
            teacher_dtype: of a teacher's logits; None for `dtype`.

        Raises:
            ValueError: for `impl="reference"`, which has no chunks.
        """
        if self.impl == "reference":
            raise ValueError('impl="reference" has all logits at one time: no plan')
        # The gradient takes the place of the logits. A teacher has its own; CPUs have no
        # product of narrow numbers with a float32 sum, so there they are widened.
        num_bytes = dtype.itemsize
        if device_type == "cpu" and dtype.itemsize < torch.float32.itemsize:
            num_bytes += torch.float32.itemsize
        num_buffers = 1 + sharded  # a chunk's sums travel beside the next product
        row_bytes = num_columns * num_bytes * num_buffers
        budget = budget_bytes(self.options.logits_memory_mib, device_type, row_bytes)
        if self._needs_teacher:
            of_teacher = (teacher_dtype or dtype).itemsize
            if not self.options.logits_memory_mib:  # chunks of the same size
                budget += budget * of_teacher // num_bytes
            num_bytes += of_teacher
        plan_with = partial(
            plan_chunks,
            num_tokens,
            num_columns,
            bytes_per_logit=num_bytes,
            budget=budget,
        )
        plan = plan_with(num_buffers=1)
        if sharded and plan.num_chunks > 1:  # else there is no next product
            plan = plan_with(num_buffers=num_buffers)
        return plan
