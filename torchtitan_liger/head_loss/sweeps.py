"""The two passes over a chunk's logits, in plain torch, on any device.

Pass 1 turns logits into a few numbers per row; pass 2 turns the logits, in place, into
the gradient of the loss by the logits. Both see only this rank's columns.

`C` tokens of a chunk, `v` this rank's columns of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Transform(NamedTuple):
    """From raw logits `u` to logits `z = softcap * tanh(u / softcap) / temperature`."""

    softcap: float  # 0 for none
    temperature: float


class Scratch(NamedTuple):
    """Memory like that of the logits, where a sweep needs more than their own."""

    capped_Cv: torch.Tensor | None  # for a softcap
    entropy_Cv: torch.Tensor | None  # for the entropy

    def rows(self, count: int) -> Scratch:
        """The first `count` rows."""
        return Scratch(*(None if x is None else x[:count] for x in self))


class LocalStatistics(NamedTuple):
    """What this rank's columns contribute, each [C]; sums are of exp(z_j - max)."""

    max: torch.Tensor  # max_j z_j
    sumexp: torch.Tensor  # sum_j exp(z_j - max)
    label_logit: torch.Tensor  # z_y where this rank holds column y, else 0
    logit_sum: torch.Tensor | None  # sum_j z_j
    shifted_sum: torch.Tensor | None  # sum_j exp(z_j - max) (z_j - max)


class SweptChunk(NamedTuple):
    """What pass 1 leaves for pass 2."""

    exp_Cv: torch.Tensor  # e_j = exp(z_j - max)
    capped_Cv: torch.Tensor | None  # u / softcap, after tanh; None without softcap
    shifted_Cv: torch.Tensor | None  # e_j (z_j - max); None without entropy


class GradientCoefficients(NamedTuple):
    """The gradient by the logit `z_j`, with e_j = exp(z_j - max):

        exp * e_j + shifted * e_j (z_j - max) + constant + label * [j is y]

    Each [C].
    """

    exp: torch.Tensor
    label: torch.Tensor
    constant: torch.Tensor | None
    shifted: torch.Tensor | None


def statistics_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    scratch: Scratch,
    *,
    need_logit_sum: bool,
) -> tuple[LocalStatistics, SweptChunk]:
    """Per-row statistics of the logits. Overwrites `logits_Cv` and `scratch`.

    Args:
        logits_Cv: raw logits in float32 or float64.
        column_C: the label's column in `logits_Cv`, or -1 where it is on another rank.
        need_logit_sum: whether a term asks for the mean logit.
    """
    capped_Cv, shifted_Cv = scratch
    if capped_Cv is not None:
        torch.div(logits_Cv, transform.softcap, out=capped_Cv).tanh_()
        factor = transform.softcap / transform.temperature
        torch.mul(capped_Cv, factor, out=logits_Cv)
    elif transform.temperature != 1:
        logits_Cv.div_(transform.temperature)
    if logits_Cv.shape[1] == 0:  # more ranks than columns
        zero_C = logits_Cv.new_zeros(logits_Cv.shape[0])
        local = LocalStatistics(
            max=torch.full_like(zero_C, -torch.inf),
            sumexp=zero_C,
            label_logit=zero_C,
            logit_sum=zero_C if need_logit_sum else None,
            shifted_sum=None if shifted_Cv is None else zero_C,
        )
        return local, SweptChunk(logits_Cv, capped_Cv, shifted_Cv)

    picked_C = logits_Cv.gather(1, column_C.clamp(min=0)[:, None]).squeeze(1)
    label_logit_C = torch.where(column_C >= 0, picked_C, 0.0)
    logit_sum_C = logits_Cv.sum(dim=1) if need_logit_sum else None
    max_C = logits_Cv.amax(dim=1)
    logits_Cv.sub_(max_C[:, None])
    if shifted_Cv is None:
        exp_Cv, shifted_sum_C = logits_Cv.exp_(), None
    else:
        shifted_Cv.copy_(logits_Cv)
        exp_Cv = logits_Cv.exp_()
        # A padded column of -inf has no share: 0 * -inf would be NaN.
        shifted_Cv.mul_(exp_Cv).nan_to_num_(nan=0.0, neginf=0.0)
        shifted_sum_C = shifted_Cv.sum(dim=1)
    local = LocalStatistics(
        max_C, exp_Cv.sum(dim=1), label_logit_C, logit_sum_C, shifted_sum_C
    )
    return local, SweptChunk(exp_Cv, capped_Cv, shifted_Cv)


def gradient_sweep(
    swept: SweptChunk,
    column_C: torch.Tensor,
    coefficients: GradientCoefficients,
    transform: Transform,
) -> torch.Tensor:
    """The gradient of the loss by the raw logits, [C, v].

    Overwrites the exponentials. The label's share is added before any rounding to a
    narrower dtype: for a confident token it nearly cancels the softmax's.
    """
    exp_C, label_C, constant_C, shifted_C = coefficients
    grad_Cv = swept.exp_Cv.mul_(exp_C[:, None])
    if grad_Cv.shape[1] == 0:
        return grad_Cv
    if shifted_C is not None:
        assert swept.shifted_Cv is not None
        grad_Cv.addcmul_(swept.shifted_Cv, shifted_C[:, None])
    if constant_C is not None:
        grad_Cv.add_(constant_C[:, None])
    here_C = torch.where(column_C >= 0, label_C, 0.0)
    grad_Cv.scatter_add_(1, column_C.clamp(min=0)[:, None], here_C[:, None])
    if swept.capped_Cv is not None:  # d tanh
        grad_Cv.mul_(swept.capped_Cv.square_().neg_().add_(1.0))
    if transform.temperature != 1:
        grad_Cv.div_(transform.temperature)
    return grad_Cv
