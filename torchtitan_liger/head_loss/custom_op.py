"""The engine as one operation for `torch.compile`, which looks neither into its loop nor
into its kernels, and so has no reason to break the graph.

`T` tokens, `N` of them that count, `D` width, `v` columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

from torchtitan_liger.head_loss.chunked import run
from torchtitan_liger.head_loss.evaluate import Metrics
from torchtitan_liger.head_loss.gradients import without_second_derivative
from torchtitan_liger.head_loss.options import HeadLossOptions
from torchtitan_liger.head_loss.passes import HeadCall
from torchtitan_liger.head_loss.products import weight_sum_dtype
from torchtitan_liger.head_loss.terms import Term


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is computed; heads that compute the same share one."""

    name: str  # by which a graph knows it
    terms: tuple[Term, ...]
    metrics: Metrics
    options: HeadLossOptions


_recipes: WeakValueDictionary[str, Recipe] = WeakValueDictionary()


def recipe_of(terms: tuple[Term, ...], options: HeadLossOptions) -> Recipe:
    """For whoever keeps it: a graph finds it only as long as someone does."""
    # A graph may outlive this process in a cache, so the name says what it is.
    name = plain = f"{terms} {options}"
    others = count(1)
    while (known := _recipes.get(name)) is not None:
        if known.options == options and _are_the_same(known.terms, terms):
            return known
        name = f"{plain} {next(others)}"  # of terms that look alike
    recipe = Recipe(name, terms, Metrics(terms), options)
    _recipes[name] = recipe
    return recipe


def _are_the_same(terms: tuple[Term, ...], others: tuple[Term, ...]) -> bool:
    """Whether they are, and stay so: frozen dataclasses of numbers and names. What else
    there is may change, or be left out of a comparison."""
    return len(terms) == len(others) and all(
        a is b or (type(a) is type(b) and _is_constant(a) and vars(a) == vars(b))
        for a, b in zip(terms, others, strict=True)
    )


def _is_constant(term: Term) -> bool:
    parameters = getattr(term, "__dataclass_params__", None)
    kinds = {bool, int, float, str, type(None)}
    return (
        parameters is not None
        and parameters.frozen
        # What is in a slot, `vars` does not have.
        and not any(vars(kind).get("__slots__") for kind in type(term).__mro__)
        and all(type(x) in kinds for x in vars(term).values())
    )


def _known_recipe(name: str) -> Recipe:
    if (recipe := _recipes.get(name)) is None:
        raise RuntimeError(
            f"a graph computes {name}, but the HeadLoss that it was made from is gone: keep "
            "that as long as the graph, or make the same one in this process"
        )
    return recipe


def fits(call: HeadCall) -> bool:
    """Whether a graph can hold the call; other calls break the graph."""
    is_whole = call.shard is None and call.teacher is None and call.sequences is None
    in_one_go = is_whole and call.products_dtype != torch.float16
    # A graph would take the operation's forward-mode derivative to be zero. An autograd
    # function says that it has none.
    return in_one_go and torch.autograd.forward_ad._current_level < 0


def apply(
    hidden_TD: torch.Tensor,
    weight_vD: torch.Tensor,
    token_weights_N: torch.Tensor | None,
    call: HeadCall,
    recipe: Recipe,
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
        call.all_labeled,
        recipe.name,
        call.with_grad and hidden_TD.requires_grad,
        call.with_grad and weight_vD.requires_grad,
    )
    return loss, by_term.detach(), metrics.detach()


@torch.compiler.disable(reason="no graph can hold this call of a head loss")
def apply_eagerly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`; a graph ends before it and another one begins after."""
    return function.apply(*args)


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
    all_labeled: bool,
    recipe_name: str,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    recipe = _known_recipe(recipe_name)
    call = HeadCall(
        terms=recipe.terms,
        metrics=recipe.metrics,
        options=recipe.options,
        labels_N=labels_N,
        rows=dict(zip(names.split(","), rows, strict=True)) if rows else {},
        kept_N=kept_N,
        all_labeled=all_labeled,
        teacher=None,
        sequences=None,
        scale=scale,
        products_dtype=products_dtype,
        tokens_per_chunk=tokens_per_chunk,
        shard=None,
        with_grad=need_d_hidden or need_d_weight,
    ).of_this_moment()
    with _autograd():
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
        result.by_token_N,
        none if result.d_hidden_TD is None else result.d_hidden_TD,
        none.clone() if result.d_weight_vD is None else result.d_weight_vD,
    )


@contextmanager
def _autograd() -> Iterator[None]:
    """The body of an operation runs without autograd, by which terms have their slopes."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch.no_grad(), torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


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
    all_labeled: bool,
    recipe_name: str,
    need_d_hidden: bool,
    need_d_weight: bool,
) -> tuple[torch.Tensor, ...]:
    recipe = _known_recipe(recipe_name)
    none = hidden_TD.new_empty(0)
    sum_dtype = weight_sum_dtype(
        products_dtype,
        weight_vD.dtype,
        recipe.options.acc_dtype,
        single_chunk=labels_N.shape[0] <= tokens_per_chunk,
    )
    return (
        torch.empty_like(scale),
        scale.new_empty(len(recipe.terms)),
        scale.new_empty(len(recipe.metrics.names)),
        scale.new_empty(labels_N.shape),
        torch.empty_like(hidden_TD, dtype=products_dtype) if need_d_hidden else none,
        weight_vD.new_empty(weight_vD.shape, dtype=sum_dtype)
        if need_d_weight
        else none.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, _, by_token_N, d_hidden_TD, d_weight_vD = output
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.token_weights_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.num_rows = len(inputs[6])
    ctx.save_for_backward(by_token_N, d_hidden_TD, d_weight_vD)


@without_second_derivative
def _backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    by_token_N, d_hidden_TD, d_weight_vD = ctx.saved_tensors
    need_d_hidden, need_d_weight, need_d_token_weights, *_ = ctx.needs_input_grad
    factor = grad_loss.reshape(1)
    d_hidden = (d_hidden_TD * factor).to(ctx.dtypes[0]) if need_d_hidden else None
    d_weight = (d_weight_vD * factor).to(ctx.dtypes[1]) if need_d_weight else None
    d_token_weights = None
    if need_d_token_weights:
        d_token_weights = (by_token_N * grad_loss).to(ctx.token_weights_dtype)
    rows = [None] * ctx.num_rows
    return d_hidden, d_weight, d_token_weights, None, None, None, rows, *[None] * 7


_head_loss.register_autograd(_backward, setup_context=_setup_context)
