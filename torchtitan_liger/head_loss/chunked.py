"""Loss and gradients of a head, a chunk of tokens at a time.

For each chunk of C tokens:

    logits_Cv = hidden_CD @ weight_vD.T       product 1
    statistics of each row                    sweep 1 (and one collective, if sharded)
    terms: loss, d loss / d statistics        a few numbers per row
    logits_Cv -> d loss / d logits, in place  sweep 2
    d_hidden_CD = d_logits @ weight           product 2
    d_weight_vD += d_logits.T @ hidden        product 3

Gradients are computed in the forward pass, while the logits exist, and scaled by the
incoming gradient in the backward pass. Nothing here waits for a GPU.

`T` tokens, `C` tokens of a chunk, `D` width, `v` this rank's columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torchtitan_liger.head_loss.calls import scale_gradient
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.sweeps import (
    GradientCoefficients,
    Scratch,
    Transform,
    gradient_sweep,
    statistics_sweep,
)
from torchtitan_liger.head_loss.terms import Rows, Statistics, Term, evaluate
from torchtitan_liger.head_loss.vocab_parallel import GlobalStatistics, VocabShard


class ChunkedCall(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    terms: Sequence[Term]
    options: HeadLossOptions
    labels_T: torch.Tensor
    rows: Rows  # each [T]
    scale: torch.Tensor  # [] factor of the loss; its dtype is that of all sums
    products_dtype: torch.dtype
    tokens_per_chunk: int
    shard: VocabShard | None
    with_grad: bool


class ChunkedHeadLoss(torch.autograd.Function):
    """`apply(hidden_TD, weight_vD, token_weights_T, call) -> (loss, by_term, metrics)`.

    `loss` is differentiable, by `token_weights_T` as well, which may be None; `by_term`,
    one sum per term before its weight, and `metrics` are not. Under vocabulary sharding
    the gradient of `hidden_TD` is this rank's share: the caller sums it over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_vD: torch.Tensor,
        token_weights_T: torch.Tensor | None,
        call: ChunkedCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The scale belongs to the gradients before they are rounded to the products'
        # dtype. Only float16 cannot hold them then: there it is applied at the end.
        one = torch.ones_like(call.scale)
        early, late = (
            (one, call.scale)
            if call.products_dtype == torch.float16
            else (call.scale, one)
        )
        weights_T = one
        if token_weights_T is not None:
            valid_T = call.labels_T != call.options.ignore_index
            weights_T = torch.where(valid_T, token_weights_T.to(one.dtype), 0.0)
        result = _run(
            hidden_TD,
            weight_vD,
            (early * weights_T).expand(len(hidden_TD)),
            call,
            need_d_hidden=call.with_grad and ctx.needs_input_grad[0],
            need_d_weight=call.with_grad and ctx.needs_input_grad[1],
        )
        ctx.dtypes = hidden_TD.dtype, weight_vD.dtype
        d_token_weights_T = None
        if token_weights_T is not None and ctx.needs_input_grad[2]:
            d_token_weights_T = (result.by_row_T * call.scale).to(token_weights_T.dtype)
        ctx.save_for_backward(
            late, d_token_weights_T, result.d_hidden_TD, result.d_weight_vD
        )
        loss = (result.by_row_T * weights_T).sum() * call.scale
        by_term, metrics = result.by_term * late, result.metrics
        ctx.mark_non_differentiable(by_term, metrics)
        return loss, by_term, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        late, d_token_weights_T, *grads = ctx.saved_tensors
        scaled = (
            None if grad is None else scale_gradient(grad, grad_loss * late, dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        if d_token_weights_T is not None:
            d_token_weights_T = d_token_weights_T * grad_loss
        return *scaled, d_token_weights_T, None


class ChunkedTokenLosses(torch.autograd.Function):
    """`apply(hidden_TD, weight_vD, call) -> losses_T`, one loss per token.

    How much each token's loss counts is known only in the backward pass, where the logits
    are computed once more: four products instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_vD: torch.Tensor, call: ChunkedCall
    ) -> torch.Tensor:
        one = torch.ones_like(call.scale).expand(len(hidden_TD))
        result = _run(
            hidden_TD, weight_vD, one, call, need_d_hidden=False, need_d_weight=False
        )
        ctx.call = call
        ctx.save_for_backward(hidden_TD, weight_vD)
        return result.by_row_T * call.scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_vD = ctx.saved_tensors
        need_d_hidden, need_d_weight, _ = ctx.needs_input_grad
        result = _run(
            hidden_TD,
            weight_vD,
            grad_T.to(ctx.call.scale.dtype) * ctx.call.scale,
            ctx.call,
            need_d_hidden=need_d_hidden,
            need_d_weight=need_d_weight,
        )
        inputs = (hidden_TD, weight_vD)
        grads = (
            None if grad is None else grad.to(x.dtype)
            for grad, x in zip(
                (result.d_hidden_TD, result.d_weight_vD), inputs, strict=True
            )
        )
        return *grads, None


METRICS = ("accuracy", "max_prob", "entropy")
"""Sums over the tokens with a label, in the order of `_Result.metrics`."""


class _Result(NamedTuple):
    by_row_T: torch.Tensor  # before the rows' weights; 0 where there is no label
    by_term: torch.Tensor
    metrics: torch.Tensor
    d_hidden_TD: torch.Tensor | None
    d_weight_vD: torch.Tensor | None


def _run(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    row_weight_T: torch.Tensor,
    call: ChunkedCall,
    *,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> _Result:
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return _run_chunks(
            hidden_TD.to(call.products_dtype),
            weight_vD.to(call.products_dtype),
            row_weight_T,
            call,
            need_d_hidden=need_d_hidden,
            need_d_weight=need_d_weight,
        )


def _run_chunks(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    row_weight_T: torch.Tensor,
    call: ChunkedCall,
    *,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> _Result:
    terms, options, shard = call.terms, call.options, call.shard
    labels_T, math_dtype = call.labels_T, call.scale.dtype
    transform = Transform(options.logit_softcap, options.temperature)
    num_columns = weight_vD.shape[0]
    vocab_size = num_columns if shard is None else shard.vocab_size
    group = None if shard is None else shard.group
    needs = frozenset().union(*(term.needs for term in terms))

    valid_T = labels_T != options.ignore_index
    column_T = labels_T - (0 if shard is None else shard.start)
    column_T = column_T.where((column_T >= 0) & (column_T < num_columns) & valid_T, -1)

    by_row_T = torch.empty_like(labels_T, dtype=math_dtype)
    by_term = by_row_T.new_zeros(len(terms))
    metrics = by_row_T.new_zeros(len(METRICS))
    d_hidden_TD = torch.empty_like(hidden_TD) if need_d_hidden else None
    d_weight = _WeightGradient(weight_vD, options.acc_dtype) if need_d_weight else None
    # The logits of every chunk in turn, in the dtype of the products and in that of the
    # sweeps; one buffer where the two are the same.
    shape = min(call.tokens_per_chunk, hidden_TD.shape[0]), num_columns
    buffer_Cv = hidden_TD.new_empty(shape)
    wide_Cv = (
        buffer_Cv
        if math_dtype == hidden_TD.dtype
        else hidden_TD.new_empty(shape, dtype=math_dtype)
    )
    scratch = Scratch(
        capped_Cv=torch.empty_like(wide_Cv) if options.logit_softcap else None,
        entropy_Cv=torch.empty_like(wide_Cv) if "entropy" in needs else None,
    )
    weight_Dv = weight_vD.t()

    for start in range(0, hidden_TD.shape[0], call.tokens_per_chunk):
        rows = slice(start, start + call.tokens_per_chunk)
        # A row without a label must not reach the gradients, whatever it holds:
        # 0 * NaN would.
        hidden_CD = hidden_TD[rows].masked_fill(~valid_T[rows, None], 0)
        column_C = column_T[rows]
        narrow_Cv = torch.mm(hidden_CD, weight_Dv, out=buffer_Cv[: len(hidden_CD)])
        logits_Cv = wide_Cv[: len(hidden_CD)]
        if wide_Cv is not buffer_Cv:
            logits_Cv.copy_(narrow_Cv)

        local, swept = statistics_sweep(
            logits_Cv,
            column_C,
            transform,
            scratch.rows(len(hidden_CD)),
            need_logit_sum="uniform_ce" in needs,
        )
        stats = GlobalStatistics(local, vocab_size, group)
        for_terms = stats.for_terms()
        values = evaluate(
            terms,
            for_terms,
            {name: x[rows] for name, x in call.rows.items()},
            row_weight_T[rows],
            valid_T[rows],
            with_partials=need_d_hidden or need_d_weight,
        )
        by_row_T[rows] = values.by_row
        by_term += values.by_term
        metrics += _metrics(for_terms, valid_T[rows])
        if values.partials is None:
            continue

        d_logits_Cv = gradient_sweep(
            swept,
            column_C,
            _coefficients(values.partials, for_terms, stats, vocab_size),
            transform,
        )
        if wide_Cv is not buffer_Cv:
            narrow_Cv.copy_(d_logits_Cv)
        else:
            narrow_Cv = d_logits_Cv
        if d_hidden_TD is not None:
            torch.mm(narrow_Cv, weight_vD, out=d_hidden_TD[rows])
        if d_weight is not None:
            d_weight.add(d_logits_Cv, narrow_Cv, hidden_CD)

    return _Result(
        by_row_T,
        by_term,
        metrics,
        d_hidden_TD,
        None if d_weight is None else d_weight.total(),
    )


def _metrics(stats: Statistics, valid_C: torch.Tensor) -> torch.Tensor:
    """`METRICS` of one chunk. The label is right where its logit is the largest one."""
    right_C = (stats.logp >= stats.max_logp).to(stats.logp.dtype)
    entropy_C = torch.zeros_like(right_C) if stats.entropy is None else stats.entropy
    values = torch.stack([right_C, stats.max_logp.exp(), entropy_C])
    return torch.where(valid_C, values, 0.0).sum(dim=1)


def _coefficients(
    partials: Statistics, values: Statistics, stats: GlobalStatistics, vocab_size: int
) -> GradientCoefficients:
    """The gradient by logits from the partials by statistic.

    By d logp = [j is y] - p, d lse = p, d uniform_ce = p - 1/V and
    d entropy = -p (log p + entropy).
    """
    softmax_coef_C = partials.lse - partials.logp
    constant_C = shifted_C = None
    if partials.uniform_ce is not None:
        softmax_coef_C = softmax_coef_C + partials.uniform_ce
        constant_C = -partials.uniform_ce / vocab_size
    scale_C = stats.softmax_scale()
    if partials.entropy is not None:
        # log p_j = (z_j - local max) + shift
        shift_C = stats.log_softmax_shift()
        assert values.entropy is not None
        share_C = partials.entropy * (values.entropy + shift_C)
        # An empty shard's maximum is -inf, and it has no columns to care.
        softmax_coef_C = softmax_coef_C - share_C.nan_to_num(posinf=0.0, neginf=0.0)
        shifted_C = -partials.entropy * scale_C
    return GradientCoefficients(
        exp=softmax_coef_C * scale_C,
        label=partials.logp,
        constant=constant_C,
        shifted=shifted_C,
    )


class _WeightGradient:
    """The sum over chunks of `d_logits.T @ hidden`, in `acc_dtype`."""

    def __init__(self, weight_vD: torch.Tensor, acc_dtype: torch.dtype) -> None:
        # Never narrower than the products.
        acc_dtype = torch.promote_types(acc_dtype, weight_vD.dtype)
        self._sum_vD = torch.empty_like(weight_vD, dtype=acc_dtype)
        self._empty = True

    def add(
        self, exact_Cv: torch.Tensor, narrow_Cv: torch.Tensor, hidden_CD: torch.Tensor
    ) -> None:
        """Add a chunk: `narrow_Cv` is `exact_Cv` in the dtype of the products."""
        total = self._sum_vD
        beta = 0.0 if self._empty else 1.0  # the first chunk overwrites
        self._empty = False
        if narrow_Cv.dtype == total.dtype:
            torch.addmm(total, narrow_Cv.t(), hidden_CD, beta=beta, out=total)
        elif narrow_Cv.is_cuda:
            torch.addmm(
                total,
                narrow_Cv.t(),
                hidden_CD,
                out_dtype=total.dtype,
                beta=beta,
                out=total,
            )
        else:  # no mixed-precision product on CPUs
            exact_vC = exact_Cv.t().to(total.dtype)
            torch.addmm(
                total, exact_vC, hidden_CD.to(total.dtype), beta=beta, out=total
            )

    def total(self) -> torch.Tensor:
        return self._sum_vD.zero_() if self._empty else self._sum_vD
