"""The engine as one operation for `torch.compile`, which looks neither into its loop nor
into its kernels, and so has no reason to break the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torchtitan_liger.head_loss.chunked import run
from torchtitan_liger.head_loss.evaluate import Metrics
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.passes import HeadCall
from torchtitan_liger.head_loss.terms import Term


class _Recipe(NamedTuple):
    terms: Sequence[Term]
    metrics: Metrics
    options: HeadLossOptions


_recipes: list[_Recipe] = []
_handles: dict[tuple[tuple[Term, ...], HeadLossOptions], int] = {}


def register(terms: Sequence[Term], metrics: Metrics, options: HeadLossOptions) -> int:
    """A number by which a graph can name what is computed. Equal ones share a number,
    unless their terms can change, and so have no hash.
    """
    key = tuple(terms), options
    new = len(_recipes)
    try:
        handle = _handles.setdefault(key, new)
    except TypeError:
        handle = new
    if handle == new:
        _recipes.append(_Recipe(key[0], metrics, options))
    return handle


def fits(call: HeadCall) -> bool:
    """Whether a graph can hold the call; other calls break the graph."""
    return call.shard is None and call.teacher is None and call.sequences is None


def apply(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    token_weights_N: torch.Tensor | None,
    call: HeadCall,
    handle: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ChunkedHeadLoss.apply`."""
    names = sorted(call.rows)
    loss, by_term, metrics, *_ = _head_loss(
        hidden_TD,
        weight_vD,
        token_weights_N,
        call.labels_N,
        call.scale,
        call.kept_N,
        [call.rows[name] for name in names],
        ",".join(names),
        call.products_dtype,
        call.tokens_per_chunk,
        handle,
        call.with_grad and hidden_TD.requires_grad,
        call.with_grad and weight_vD.requires_grad,
    )
    return loss, by_term, metrics


@torch.library.custom_op("torchtitan_liger::head_loss", mutates_args=())
def _head_loss(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    token_weights_N: torch.Tensor | None,
    labels_N: torch.Tensor,
    scale: torch.Tensor,
    kept_N: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    names: str,
    products_dtype: torch.dtype,
    tokens_per_chunk: int,
    handle: int,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    recipe = _recipes[handle]
    call = HeadCall(
        *recipe,
        labels_N=labels_N,
        rows=dict(zip(names.split(","), rows, strict=True)) if rows else {},
        kept_N=kept_N,
        all_labeled=kept_N is not None,
        teacher=None,
        sequences=None,
        two_phase=False,
        scale=scale,
        products_dtype=products_dtype,
        tokens_per_chunk=tokens_per_chunk,
        shard=None,
        with_grad=need_d_hidden or need_d_weight,
    )
    # Inside an operation torch leaves autograd out; terms without slopes need it.
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.no_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        result = run(
            hidden_TD,
            weight_vD,
            token_weights_N,
            call,
            need_d_hidden=need_d_hidden,
            need_d_weight=need_d_weight,
        )
    none = hidden_TD.new_empty(0)
    return (
        result.loss,
        result.by_term,
        result.metrics,
        result.by_row_N,
        result.late.clone(),
        none if result.d_hidden_TD is None else result.d_hidden_TD,
        none.clone() if result.d_weight_vD is None else result.d_weight_vD,
    )


@_head_loss.register_fake
def _(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    token_weights_N: torch.Tensor | None,
    labels_N: torch.Tensor,
    scale: torch.Tensor,
    kept_N: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    names: str,
    products_dtype: torch.dtype,
    tokens_per_chunk: int,
    handle: int,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> tuple[torch.Tensor, ...]:
    recipe = _recipes[handle]
    none = hidden_TD.new_empty(0)
    single = labels_N.shape[0] <= tokens_per_chunk
    single = single and weight_vD.dtype == products_dtype
    acc_dtype = products_dtype if single else recipe.options.acc_dtype
    acc_dtype = torch.promote_types(acc_dtype, products_dtype)
    if products_dtype == torch.float16:
        acc_dtype = torch.float32
    return (
        torch.empty_like(scale),
        scale.new_empty(len(recipe.terms)),
        scale.new_empty(len(recipe.metrics.names)),
        scale.new_empty(labels_N.shape),
        torch.empty_like(scale),
        torch.empty_like(hidden_TD, dtype=products_dtype) if need_d_hidden else none,
        weight_vD.new_empty(weight_vD.shape, dtype=acc_dtype)
        if need_d_weight
        else none.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, _, by_row_N, late, d_hidden_TD, d_weight_vD = output
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.num_rows = len(inputs[6])
    ctx.weights_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.save_for_backward(by_row_N, late, d_hidden_TD, d_weight_vD)


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    by_row_N, late, d_hidden_TD, d_weight_vD = ctx.saved_tensors
    need_d_hidden, need_d_weight, need_d_weights = ctx.needs_input_grad[:3]
    factor = (grad_loss * late).reshape(1)
    d_hidden = (d_hidden_TD * factor).to(ctx.dtypes[0]) if need_d_hidden else None
    d_weight = (d_weight_vD * factor).to(ctx.dtypes[1]) if need_d_weight else None
    d_weights = None
    if need_d_weights:
        d_weights = (by_row_N * grad_loss).to(ctx.weights_dtype)
    no_rows = [None] * ctx.num_rows  # a list, as they came
    return d_hidden, d_weight, d_weights, *[None] * 3, no_rows, *[None] * 6


_head_loss.register_autograd(_backward, setup_context=_setup_context)
