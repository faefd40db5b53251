"""Gradients of a forward pass, handed on in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

import torchtitan_liger.head_loss.sweeps as torch_sweeps
from torchtitan_liger.head_loss.passes import sweeps_for

_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def without_second_derivative(backward: _Backward) -> _Backward:
    """A backward pass that refuses `create_graph=True`.

    torch's `once_differentiable` raises only where its own node is reached, which it is not
    from the incoming gradient of a loss, a constant: the second derivative would be zero.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a head loss has no second derivative: leave out create_graph=True, or "
                'compute this loss with impl="reference"'
            )
        return backward(ctx, *grads)

    return cast(_Backward, wrapped)


def scale_gradient(
    grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`grad * factor` in `dtype`, rounded once; for use in a backward pass.

    Takes over the memory of `grad`, unless the graph is kept for another pass.
    """
    in_place = dtype == grad.dtype and not _graph_is_kept()
    out = grad if in_place else torch.empty_like(grad, dtype=dtype)
    # A kernel takes them as they lie in memory.
    sweeps = sweeps_for(grad.device.type) if grad.is_contiguous() else torch_sweeps
    # With no dims, the factor would first be rounded to the dtype of `grad`.
    sweeps.scale(grad, factor.reshape(1), out)
    return out


def _graph_is_kept() -> bool:
    """Whether this backward pass runs with `retain_graph`; True if torch cannot tell."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()
