"""The two passes over a chunk's logits, in plain torch, on any device.

Pass 1 turns logits into a few numbers per row; pass 2 turns the logits, in place, into
the gradient of the loss by the logits. Both see only this rank's columns.

`C` tokens of a chunk, `v` this rank's columns of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LocalStatistics(NamedTuple):
    """What this rank's columns contribute, each [C]."""

    max: torch.Tensor  # max_j z_j
    sumexp: torch.Tensor  # sum_j exp(z_j - max)
    label_logit: torch.Tensor  # z_y where this rank holds column y, else 0
    logit_sum: torch.Tensor | None  # sum_j z_j


class SweptChunk(NamedTuple):
    """What pass 1 leaves for pass 2."""

    exp_Cv: torch.Tensor  # exp(z - max)
    capped_Cv: torch.Tensor | None  # z / softcap; None without softcap


class GradientCoefficients(NamedTuple):
    """The gradient by the logit j is `exp * exp_j + constant + label * [j is y]`.

    Each [C].
    """

    exp: torch.Tensor
    label: torch.Tensor
    constant: torch.Tensor | None


def statistics_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    *,
    softcap: float,
    capped_Cv: torch.Tensor | None,
    need_logit_sum: bool,
) -> tuple[LocalStatistics, SweptChunk]:
    """Per-row statistics of the logits. Overwrites `logits_Cv`.

    Args:
        logits_Cv: raw logits in float32 or float64.
        column_C: the label's column in `logits_Cv`, or -1 where it is on another rank.
        softcap: bound of the logits, 0 for none.
        capped_Cv: with a softcap, memory like that of `logits_Cv`.
        need_logit_sum: whether a term asks for the mean logit.
    """
    if capped_Cv is not None:
        torch.div(logits_Cv, softcap, out=capped_Cv).tanh_()
        logits_Cv = torch.mul(capped_Cv, softcap, out=logits_Cv)
    if logits_Cv.shape[1] == 0:  # more ranks than columns
        zero_C = logits_Cv.new_zeros(logits_Cv.shape[0])
        local = LocalStatistics(
            torch.full_like(zero_C, -torch.inf),
            zero_C,
            zero_C,
            zero_C if need_logit_sum else None,
        )
        return local, SweptChunk(logits_Cv, capped_Cv)

    picked_C = logits_Cv.gather(1, column_C.clamp(min=0)[:, None]).squeeze(1)
    label_logit_C = torch.where(column_C >= 0, picked_C, 0.0)
    logit_sum_C = logits_Cv.sum(dim=1) if need_logit_sum else None
    max_C = logits_Cv.amax(dim=1)
    exp_Cv = logits_Cv.sub_(max_C[:, None]).exp_()
    local = LocalStatistics(max_C, exp_Cv.sum(dim=1), label_logit_C, logit_sum_C)
    return local, SweptChunk(exp_Cv, capped_Cv)


def gradient_sweep(
    swept: SweptChunk, column_C: torch.Tensor, coefficients: GradientCoefficients
) -> torch.Tensor:
    """The gradient of the loss by the raw logits, [C, v].

    Overwrites the exponentials. The label's share is added before any rounding to a
    narrower dtype: for a confident token it nearly cancels the softmax's.
    """
    grad_Cv = swept.exp_Cv.mul_(coefficients.exp[:, None])
    if grad_Cv.shape[1] == 0:
        return grad_Cv
    if coefficients.constant is not None:
        grad_Cv.add_(coefficients.constant[:, None])
    here_C = torch.where(column_C >= 0, coefficients.label, 0.0)
    grad_Cv.scatter_add_(1, column_C.clamp(min=0)[:, None], here_C[:, None])
    if swept.capped_Cv is not None:  # d tanh
        grad_Cv.mul_(swept.capped_Cv.square_().neg_().add_(1.0))
    return grad_Cv
