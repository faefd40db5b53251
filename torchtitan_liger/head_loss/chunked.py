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
    gradient_sweep,
    statistics_sweep,
)
from torchtitan_liger.head_loss.terms import Statistics, Term, evaluate
from torchtitan_liger.head_loss.vocab_parallel import GlobalStatistics, VocabShard


class ChunkedCall(NamedTuple):
    """Everything about a call that is not a differentiable tensor."""

    terms: Sequence[Term]
    options: HeadLossOptions
    labels_T: torch.Tensor
    scale: torch.Tensor  # [] factor of the loss; its dtype is that of all sums
    products_dtype: torch.dtype
    tokens_per_chunk: int
    shard: VocabShard | None
    with_grad: bool


class ChunkedHeadLoss(torch.autograd.Function):
    """`apply(hidden_TD, weight_vD, call) -> (loss, by_term)`.

    `loss` is differentiable; `by_term`, one sum per term before its weight, is not.
    Under vocabulary sharding the gradient of `hidden_TD` is this rank's share: the caller
    sums it over the group.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_vD: torch.Tensor, call: ChunkedCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The scale belongs to the gradients before they are rounded to the products'
        # dtype. Only float16 cannot hold them then: there it is applied at the end.
        one = torch.ones_like(call.scale)
        early, late = (
            (one, call.scale)
            if call.products_dtype == torch.float16
            else (call.scale, one)
        )
        with torch.autocast(hidden_TD.device.type, enabled=False):
            result = _run(
                hidden_TD.to(call.products_dtype),
                weight_vD.to(call.products_dtype),
                early,
                call,
                need_d_hidden=call.with_grad and ctx.needs_input_grad[0],
                need_d_weight=call.with_grad and ctx.needs_input_grad[1],
            )
        ctx.dtypes = hidden_TD.dtype, weight_vD.dtype
        ctx.save_for_backward(late, result.d_hidden_TD, result.d_weight_vD)
        loss, by_term = result.loss * late, result.by_term * late
        ctx.mark_non_differentiable(by_term)
        return loss, by_term

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_loss: torch.Tensor, _grad_by_term: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        late, *grads = ctx.saved_tensors
        scaled = (
            None if grad is None else scale_gradient(grad, grad_loss * late, dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return *scaled, None


class _Result(NamedTuple):
    loss: torch.Tensor
    by_term: torch.Tensor
    d_hidden_TD: torch.Tensor | None
    d_weight_vD: torch.Tensor | None


def _run(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    scale: torch.Tensor,
    call: ChunkedCall,
    *,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> _Result:
    terms, options, shard = call.terms, call.options, call.shard
    labels_T, math_dtype = call.labels_T, scale.dtype
    num_columns = weight_vD.shape[0]
    vocab_size = num_columns if shard is None else shard.vocab_size
    group = None if shard is None else shard.group
    needs = frozenset().union(*(term.needs for term in terms))

    valid_T = labels_T != options.ignore_index
    row_weight_T = torch.where(valid_T, scale, 0.0)
    column_T = labels_T - (0 if shard is None else shard.start)
    column_T = column_T.where((column_T >= 0) & (column_T < num_columns) & valid_T, -1)

    loss = torch.zeros((), dtype=math_dtype, device=hidden_TD.device)
    by_term = torch.zeros(len(terms), dtype=math_dtype, device=hidden_TD.device)
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
    capped_Cv = torch.empty_like(wide_Cv) if options.logit_softcap else None
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
            softcap=options.logit_softcap,
            capped_Cv=None if capped_Cv is None else capped_Cv[: len(hidden_CD)],
            need_logit_sum="uniform_ce" in needs,
        )
        stats = GlobalStatistics(local, vocab_size, group)
        values = evaluate(
            terms,
            stats.for_terms(),
            row_weight_T[rows],
            with_partials=need_d_hidden or need_d_weight,
        )
        loss += values.loss
        by_term += values.by_term
        if values.partials is None:
            continue

        d_logits_Cv = gradient_sweep(
            swept, column_C, _coefficients(values.partials, stats, vocab_size)
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
        loss, by_term, d_hidden_TD, None if d_weight is None else d_weight.total()
    )


def _coefficients(
    partials: Statistics, stats: GlobalStatistics, vocab_size: int
) -> GradientCoefficients:
    """The gradient by logits from the partials by statistic.

    By d logp = [j is y] - p, d lse = p and d uniform_ce = p - 1/V.
    """
    softmax_coef_C = partials.lse - partials.logp
    constant_C = None
    if partials.uniform_ce is not None:
        softmax_coef_C = softmax_coef_C + partials.uniform_ce
        constant_C = -partials.uniform_ce / vocab_size
    return GradientCoefficients(
        exp=softmax_coef_C * stats.softmax_scale(),
        label=partials.logp,
        constant=constant_C,
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
