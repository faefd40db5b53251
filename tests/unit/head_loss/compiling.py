"""A batch for compiled functions, and how far they are from the functions themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.helpers import Problem, relative_error

B, L, D, V = 3, 12, 16, 101


@dataclass
class Batch:
    """Leaves that learn, and numbers that do not, all [B, L, ...]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    token_weights: torch.Tensor
    rows: dict[str, torch.Tensor]

    @property
    def leaves(self) -> list[torch.Tensor]:
        leaves = (self.hidden, self.weight, self.token_weights)
        return [x for x in leaves if x.requires_grad]


def batch(length: int = L, seed: int = 0) -> Batch:
    problem = Problem(T=B * length, D=D, V=V, seed=seed)
    g = torch.Generator().manual_seed(seed)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(B, length, *size, generator=g, dtype=torch.float64)

    return Batch(
        problem.hidden.view(B, length, D).requires_grad_(),
        problem.weight.requires_grad_(),
        problem.labels.view(B, length),
        numbers().abs().requires_grad_(),
        {
            "advantages": numbers(),
            "old_logp": -5 + numbers(),
            "candidates": torch.randint(-1, V, (B, length, 3), generator=g),
        },
    )


def errors(compiled: Callable[..., Any], eager: Callable[..., Any], b: Batch) -> float:
    """The largest error of values and gradients, for an upstream gradient of -0.37."""
    leaves = b.leaves
    values = []
    for loss_of in (compiled, eager):
        loss = loss_of(b)
        grads = torch.autograd.grad(loss * -0.37, leaves, allow_unused=True)
        values.append([loss.detach(), *grads])
    assert [x is None for x in values[0]] == [x is None for x in values[1]]
    return max(
        relative_error(ours, truth)
        for ours, truth in zip(*values, strict=True)
        if truth is not None
    )


def compiled(
    loss_of: Callable[[Batch], torch.Tensor],
    backend: str = "aot_eager",
    fullgraph: bool = True,
    **settings: Any,
) -> Callable[[Batch], torch.Tensor]:
    return torch.compile(loss_of, backend=backend, fullgraph=fullgraph, **settings)
