"""Loss and gradients of a head, a chunk of tokens at a time.

`passes.py` has what happens to a chunk. Here is in which order: chunk by chunk, or, where
a token's loss depends on tokens of other chunks, all statistics before any gradient.

Gradients are computed in the forward pass, while the logits exist, and scaled by the
incoming gradient in the backward pass. float16 may not hold them without that scale: its
logits are computed once more in the backward pass. Nothing here waits for a GPU.

`T` tokens, `N` of them that count, `D` width, `v` this rank's columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from torchtitan_liger.head_loss.evaluate import partials_of, values_of
from torchtitan_liger.head_loss.gradients import (
    scale_gradient,
    without_second_derivative,
)
from torchtitan_liger.head_loss.passes import Chunk, HeadCall, Passes
from torchtitan_liger.head_loss.statistics import (
    IN_ONE_TRIP,
    Partials,
    Statistics,
    Sums,
)
from torchtitan_liger.head_loss.terms import Term, slopes_of


class ChunkedHeadLoss(torch.autograd.Function):
    """`apply(hidden_TD, weight_vD, token_weights_N, call) -> (loss, by_term, metrics)`.

    `loss` is differentiable, by `token_weights_N` as well, which may be None; `by_term`,
    one sum per term before its weight, and `metrics` are not. Under vocabulary sharding
    the gradient of `hidden_TD` is this rank's share: the caller sums it over the group.

    With `call.by_token`, `loss` is [N]. How much each token's counts is known only in the
    backward pass, where the logits are computed once more: four products instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_vD: torch.Tensor,
        token_weights_N: torch.Tensor | None,
        call: HeadCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        call = call.of_this_moment()
        need_d_hidden, need_d_weight, need_d_token_weights, _ = ctx.needs_input_grad
        ctx.later = call.by_token or call.products_dtype == torch.float16
        now = call.with_grad and not ctx.later
        result = run(
            hidden_TD,
            weight_vD,
            token_weights_N,
            call,
            need_d_hidden=now and need_d_hidden,
            need_d_weight=now and need_d_weight,
            need_partials=call.with_grad and ctx.later,
        )
        d_token_weights_N = result.by_token_N if need_d_token_weights else None
        if ctx.later:
            ctx.sums, ctx.partials = result.sums, result.partials
            # What the logits are computed from once more may not change until then; it is
            # autograd's alone to keep and to free.
            again = call.read_again()
            ctx.call = call.reading([x.new_empty(0) for x in again])
            ctx.save_for_backward(d_token_weights_N, hidden_TD, weight_vD, *again)
        else:
            ctx.dtypes = hidden_TD.dtype, weight_vD.dtype
            ctx.save_for_backward(
                d_token_weights_N, result.d_hidden_TD, result.d_weight_vD
            )
        ctx.mark_non_differentiable(result.by_term, result.metrics)
        loss = result.by_token_N if call.by_token else result.loss
        return loss, result.by_term, result.metrics

    @staticmethod
    @without_second_derivative
    def backward(
        ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        d_token_weights_N, *saved = ctx.saved_tensors
        if d_token_weights_N is not None:
            d_token_weights_N = d_token_weights_N * grad_loss
        if ctx.later:
            by_N = grad_loss.to(ctx.call.scale.dtype).expand(len(ctx.call.labels_N))
            grads = _later_gradients(ctx, saved, by_N)
            return *grads, d_token_weights_N, None
        scaled = (
            None if grad is None else scale_gradient(grad, grad_loss, dtype)
            for grad, dtype in zip(saved, ctx.dtypes, strict=True)
        )
        return *scaled, d_token_weights_N, None


def _later_gradients(
    ctx: Any, saved: Sequence[torch.Tensor], by_N: torch.Tensor
) -> Iterator[torch.Tensor | None]:
    """Of hidden states and weight, in their dtypes, from the logits computed once more.

    Args:
        ctx: has the `call`, its `sums`, and the `partials` of a loss.
        saved: hidden states, weight, and what `call.read_again` gave, as autograd kept it.
        by_N: how often each token's loss counts.
    """
    need_d_hidden, need_d_weight, *_ = ctx.needs_input_grad
    hidden_TD, weight_vD, *again = saved
    with torch.autocast(hidden_TD.device.type, enabled=False):
        passes = Passes(
            hidden_TD,
            weight_vD,
            ctx.call.reading(again),
            need_d_hidden=need_d_hidden,
            need_d_weight=need_d_weight,
        )
        by_N = torch.where(passes.inputs.valid, by_N, 0.0)  # NaN times 0 is not 0
        _second_phase(passes, ctx.sums, ctx.partials.times(by_N))
    return (
        None if grad is None else grad.to(x.dtype)
        for grad, x in zip(passes.totals(), (hidden_TD, weight_vD), strict=True)
    )


class Result(NamedTuple):
    loss: torch.Tensor  # []
    by_token_N: torch.Tensor  # each token's loss before its weight, scaled
    by_term: torch.Tensor  # scaled
    metrics: torch.Tensor  # [M] sums, then extremes; not scaled
    sums: Sums
    partials: Partials | None
    d_hidden_TD: torch.Tensor | None
    d_weight_vD: torch.Tensor | None


def run(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    token_weights_N: torch.Tensor | None,
    call: HeadCall,
    *,
    need_d_hidden: bool,
    need_d_weight: bool,
    need_partials: bool = False,
) -> Result:
    """Everything about a call in one go; or, with `need_partials` instead of gradients,
    what they are made of."""
    one = torch.ones_like(call.scale)
    token_weight_N = one.expand(len(call.labels_N))
    if token_weights_N is not None:
        valid_N = call.labels_N != call.options.ignore_index
        token_weight_N = torch.where(valid_N, token_weights_N.to(one.dtype), 0.0)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        passes = Passes(
            hidden_TD,
            weight_vD,
            call,
            need_d_hidden=need_d_hidden,
            need_d_weight=need_d_weight,
        )
        with_grad = need_d_hidden or need_d_weight
        # The scale belongs to the gradients before they are rounded.
        weight_N = call.scale * token_weight_N
        two_phase, constant = call.two_phase, _slopes_are_constant(call.terms)
        # A row's gradient may need nothing but the row: no other tokens, no other ranks'
        # columns, and no statistic that is known only when the row has been read.
        of_rows_alone = with_grad and not two_phase and call.shard is None
        parts = []
        if of_rows_alone and constant and call.needs <= IN_ONE_TRIP:
            for tokens in call.chunks():
                constants = _partials(passes, None, tokens, weight_N)
                parts.append(
                    passes.gradients_in_one_trip(passes.logits(tokens), constants)
                )
        else:
            of_mixture = [term for term in call.terms if "jsd" in term.needs]
            mixture_last = (
                of_rows_alone and bool(of_mixture) and _slopes_are_constant(of_mixture)
            )
            for chunk, part in _one_by_one(passes, with_mixture=not mixture_last):
                parts.append(part)
                if with_grad and not two_phase:
                    statistics = None if constant else passes.statistics(part)
                    of_loss = _partials(passes, statistics, chunk.tokens, weight_N)
                    coefficients = passes.coefficients(of_loss, part, statistics)
                    lacking = part if mixture_last else None
                    passes.gradients(chunk, coefficients, lacking)
        sums = _together(parts)
        # What is only reported comes last, for all tokens at once.
        statistics, inputs = passes.statistics(sums), passes.inputs
        values = values_of(call.terms, statistics, inputs, weight_N)
        # From the logits, of which logarithms round.
        is_correct_N = sums["label_logit"] >= sums["max"]
        metrics = call.metrics.of_rows(call.terms, statistics, inputs, is_correct_N)
        partials = None
        if need_partials or (with_grad and two_phase):
            partials = partials_of(call.terms, statistics, inputs, weight_N)
            if with_grad:
                _second_phase(passes, sums, partials)
    return Result(
        (values.by_token * token_weight_N).sum() * call.scale,
        values.by_token * call.scale,
        values.by_term,
        metrics,
        sums,
        partials,
        *passes.totals(),
    )


def _one_by_one(passes: Passes, *, with_mixture: bool) -> Iterator[tuple[Chunk, Sums]]:
    """Each chunk with its sums, while its logits are still there."""
    finish = partial(passes.finish, with_mixture=with_mixture)
    pending = None
    for tokens in passes.call.chunks():
        chunk = passes.logits(tokens)
        wait = passes.start(chunk)
        if passes.call.shard is None:
            yield chunk, finish(chunk, wait)
            continue
        # While a chunk's sums travel, the next one's logits are computed.
        if pending is not None:
            yield pending[0], finish(*pending)
        pending = chunk, wait
    if pending is not None:
        yield pending[0], finish(*pending)


def _together(parts: Sequence[Sums]) -> Sums:
    """The sums of several chunks, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return {
        name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]
    }


def _slopes_are_constant(terms: Sequence[Term]) -> bool:
    return all(slopes_of(term) is not None for term in terms if term.weight)


def _partials(
    passes: Passes, statistics: Statistics | None, tokens: slice, weight_N: torch.Tensor
) -> Partials:
    inputs = passes.inputs.part(tokens)
    return partials_of(passes.call.terms, statistics, inputs, weight_N[tokens])


def _second_phase(passes: Passes, sums: Sums, partials: Partials) -> None:
    """The logits once more, in the same chunks and so to the same bits."""
    coefficients = passes.coefficients(partials, sums, None)
    for tokens in passes.call.chunks():
        passes.gradients(passes.logits(tokens), coefficients.part(tokens))
