"""The passes over a chunk's logits in plain torch, on any device.

`statistics_sweep` reads the logits and leaves a few sums per row; `gradient_sweep` turns
them, in place, into the gradient of the loss by the logits; `one_trip_sweep` does both where
nothing comes between. A JSD has `mixture_sweep` there, or `mixture_gradient_sweep`, which is
the gradient's too. All see only this rank's columns, and go through blocks of rows that fit
into a processor's cache, so that a chain of elementwise operations costs one trip to memory.

`C` tokens of a chunk, `v` this rank's columns of the vocabulary, `K` candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from torchtitan_liger.head_loss.statistics import (
    Coefficients,
    Partials,
    Sums,
    coefficients_of,
    statistics_of,
)


class Transform(NamedTuple):
    """From raw logits `u` to logits `z = softcap * tanh(u / softcap) / temperature`."""

    softcap: float = 0.0  # 0 for none
    temperature: float = 1.0


class Logits(NamedTuple):
    """Raw logits, and what turns them into those of a softmax."""

    logits_Cv: torch.Tensor
    transform: Transform


# Elements of a block. 2 MiB of float32 lie in the cache of a CPU core; a GPU wants long
# operations more than short trips.
CPU_BLOCK_ELEMENTS = 2**19
GPU_BLOCK_ELEMENTS = 2**23


def statistics_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    sums: Sums,
    *,
    candidates_CK: torch.Tensor | None = None,
    teacher: Logits | None = None,
) -> None:
    """Fill `sums`, whose dtype is that of the arithmetic, from the logits.

    Args:
        logits_Cv: raw logits.
        column_C: the label's column in `logits_Cv`, or -1 where it is on another rank.
        candidates_CK: likewise, for token ids other than the label.
    """
    for rows in _blocks(logits_Cv):
        part = {name: x[..., rows] for name, x in sums.items()}
        if logits_Cv.shape[1] == 0:
            for name, x in part.items():
                x.fill_(-torch.inf if name in ("max", "teacher_max") else 0.0)
            continue
        z, _ = _transformed(logits_Cv[rows], transform, part["max"].dtype)
        _sums_of_logits(z, column_C[rows], part)
        if candidates_CK is not None:
            part["candidate_logits"].copy_(_pick(z, candidates_CK[rows]).t())
        shifted = z.sub(_finite(part["max"])[:, None])
        exp = shifted.exp()
        torch.sum(exp, dim=1, out=part["sumexp"])
        if "shifted_sum" in part:
            torch.sum(_product(exp, shifted), dim=1, out=part["shifted_sum"])
        if "square_sum" in part:
            torch.sum(exp.square(), dim=1, out=part["square_sum"])
        if teacher is not None:
            v, _ = _transformed(teacher.logits_Cv[rows], teacher.transform, z.dtype)
            torch.amax(v, dim=1, out=part["teacher_max"])
            t_shifted = v.sub(_finite(part["teacher_max"])[:, None])
            t_exp = t_shifted.exp()
            torch.sum(t_exp, dim=1, out=part["teacher_sumexp"])
            if "teacher_shifted_sum" in part:
                weighted = _product(t_exp, t_shifted)
                torch.sum(weighted, dim=1, out=part["teacher_shifted_sum"])
            if "student_gap" in part:
                weighted = _product(exp, shifted - t_shifted)
                torch.sum(weighted, dim=1, out=part["student_gap"])
            if "teacher_gap" in part:
                weighted = _product(t_exp, t_shifted - shifted)
                torch.sum(weighted, dim=1, out=part["teacher_gap"])


def mixture_sweep(
    logits_Cv: torch.Tensor,
    transform: Transform,
    teacher: Logits,
    sums: Sums,
    beta: float,
) -> torch.Tensor:
    """These columns' share of `MIXTURE_SUMS`, packed as [2, C].

    Args:
        sums: over the columns of all ranks.
    """
    shares_2C = sums["max"].new_zeros(2, logits_Cv.shape[0])
    if logits_Cv.shape[1] == 0:
        return shares_2C
    student, dtype = Logits(logits_Cv, transform), shares_2C.dtype
    for rows in _blocks(logits_Cv):
        log_p = _log_softmax(student, sums["max"], sums["sumexp"], rows, dtype)
        log_q = _log_softmax(
            teacher, sums["teacher_max"], sums["teacher_sumexp"], rows, dtype
        )
        m_by_p, q_by_m = _to_mixture(log_p, log_q, beta)
        torch.sum(_product(log_p.exp(), -m_by_p), dim=1, out=shares_2C[0, rows])
        torch.sum(_product(log_q.exp(), q_by_m), dim=1, out=shares_2C[1, rows])
    return shares_2C


def mixture_gradient_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    coefficients: Coefficients,
    sums: Sums,
    *,
    candidates_CK: torch.Tensor | None = None,
    teacher: Logits,
    jsd_beta: float,
) -> torch.Tensor:
    """`mixture_sweep` and then `gradient_sweep`, in one trip to memory, of all columns.

    Args:
        coefficients: from sums without `MIXTURE_SUMS`.
        sums: likewise.
    """
    shares_2C = sums["max"].new_zeros(2, logits_Cv.shape[0])
    for rows in _blocks(logits_Cv):
        block = logits_Cv[rows]
        of_rows = {name: x[..., rows] for name, x in sums.items()}
        other = teacher._replace(logits_Cv=teacher.logits_Cv[rows])
        shares_2C[:, rows] = mixture_sweep(block, transform, other, of_rows, jsd_beta)
        gradient_sweep(
            block,
            column_C[rows],
            transform,
            coefficients.part(rows).with_mixture(shares_2C[0, rows]),
            candidates_CK=None if candidates_CK is None else candidates_CK[rows],
            teacher=other,
            jsd_beta=jsd_beta,
        )
    return shares_2C


def gradient_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    coefficients: Coefficients,
    *,
    candidates_CK: torch.Tensor | None = None,
    teacher: Logits | None = None,
    jsd_beta: float = 0.5,
) -> None:
    """Turn raw logits into the gradient of the loss by them, in place.

    The label's share is added before any rounding to a narrower dtype: for a confident
    token it nearly cancels the softmax's.
    """
    if logits_Cv.shape[1] == 0:
        return
    by = coefficients
    log_sumexp_C = by.sumexp.log()
    for rows in _blocks(logits_Cv):
        z, capped = _transformed(logits_Cv[rows], transform, by.max.dtype)
        # `z` may be the logits themselves, which are not needed any more.
        shifted = z.sub_(_finite(by.max[rows])[:, None])
        softmax_C = by.softmax[rows] / by.sumexp[rows]
        others = (by.log_softmax, by.square, by.teacher, by.log_teacher, by.mixture)
        if all(x is None for x in others):
            grad = shifted.exp_().mul_(softmax_C[:, None])
        else:
            grad = _general_gradient(shifted, log_sumexp_C, by, rows, teacher, jsd_beta)
        if by.candidates is not None:
            assert candidates_CK is not None
            _scatter(grad, candidates_CK[rows], by.candidates[rows])
        _finish(grad, column_C[rows], by.part(rows), capped, transform, logits_Cv[rows])


def one_trip_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    sums: Sums,
    partials: Partials,
    *,
    teacher: Logits | None = None,
) -> None:
    """`statistics_sweep` and then `gradient_sweep`, in one trip to memory, of all columns;
    without a teacher with one exponential of each logit.

    Args:
        partials: by statistics in `IN_ONE_TRIP` alone.
    """
    vocab_size = logits_Cv.shape[1]
    for rows in _blocks(logits_Cv):
        part = {name: x[rows] for name, x in sums.items()}
        of_loss, column = partials.part(rows), column_C[rows]
        if teacher is not None:
            block = logits_Cv[rows]
            other = teacher._replace(logits_Cv=teacher.logits_Cv[rows])
            statistics_sweep(block, column, transform, part, teacher=other)
            needs = {"kl_rev"} if of_loss.need_values else set()
            values = statistics_of(part, needs, vocab_size)
            by = coefficients_of(of_loss, values, part, vocab_size)
            gradient_sweep(block, column, transform, by, teacher=other)
            continue
        by = coefficients_of(of_loss, None, part, vocab_size)
        z, capped = _transformed(logits_Cv[rows], transform, part["max"].dtype)
        _sums_of_logits(z, column, part)
        # `z` may be the logits themselves, which are not needed any more.
        exp = z.sub_(_finite(part["max"])[:, None]).exp_()
        torch.sum(exp, dim=1, out=part["sumexp"])
        grad = exp.mul_((by.softmax / part["sumexp"])[:, None])
        _finish(grad, column, by, capped, transform, logits_Cv[rows])


def _sums_of_logits(z: torch.Tensor, column_C: torch.Tensor, sums: Sums) -> None:
    """Fill those that need no exponentials."""
    torch.amax(z, dim=1, out=sums["max"])
    sums["label_logit"].copy_(_pick(z, column_C[:, None])[:, 0])
    if "logit_sum" in sums:
        torch.sum(z, dim=1, out=sums["logit_sum"])


def _finish(
    grad: torch.Tensor,
    column_C: torch.Tensor,
    by: Coefficients,
    capped: torch.Tensor | None,
    transform: Transform,
    out: torch.Tensor,
) -> None:
    """Add what is no multiple of a softmax, and go from logits to raw ones."""
    if by.constant is not None:
        grad.add_(by.constant[:, None])
    _scatter(grad, column_C[:, None], by.label[:, None])
    if capped is not None:  # d tanh
        grad.mul_(capped.square_().neg_().add_(1.0))
    if transform.temperature != 1:
        grad.div_(transform.temperature)
    if grad.data_ptr() != out.data_ptr():
        out.copy_(grad)


def scale(grad: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """`out = grad * factor`, with a factor [1] in at least float32."""
    torch.mul(grad, factor, out=out)


def _general_gradient(
    shifted: torch.Tensor,
    log_sumexp_C: torch.Tensor,
    by: Coefficients,
    rows: slice,
    teacher: Logits | None,
    beta: float,
) -> torch.Tensor:
    """The dense part of the gradient for any coefficients but the constant."""
    log_p = shifted.sub_(log_sumexp_C[rows, None])
    p = log_p.exp()
    factor = by.softmax[rows, None].expand_as(p).clone()
    log_q = None
    if by.teacher_max is not None:
        assert teacher is not None
        assert by.teacher_sumexp is not None
        log_q = _log_softmax(teacher, by.teacher_max, by.teacher_sumexp, rows, p.dtype)
    if by.log_softmax is not None:
        factor.addcmul_(by.log_softmax[rows, None], log_p)
    if by.square is not None:
        factor.addcmul_(by.square[rows, None], p)
    if by.log_teacher is not None:
        assert log_q is not None
        factor.addcmul_(by.log_teacher[rows, None], log_q)
    if by.mixture is not None:
        assert log_q is not None
        m_by_p, _ = _to_mixture(log_p, log_q, beta)
        factor.addcmul_(by.mixture[rows, None], m_by_p)
    grad = _product(p, factor)
    if by.teacher is not None:
        assert log_q is not None
        grad.addcmul_(by.teacher[rows, None], log_q.exp_())
    return grad


def _log_softmax(
    one: Logits,
    max_C: torch.Tensor,
    sumexp_C: torch.Tensor,
    rows: slice,
    dtype: torch.dtype,
) -> torch.Tensor:
    z, _ = _transformed(one.logits_Cv[rows], one.transform, dtype)
    return z.sub(_finite(max_C[rows])[:, None]).sub_(sumexp_C[rows].log()[:, None])


def _to_mixture(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log(m / p) and log(q / m) of `m = beta q + (1 - beta) p`; also of small ones."""
    gap = log_q - log_p
    # Of the smaller and the larger one; neither may be what the other leaves of 1.
    of_p, of_q = gap.new_full((), 1 - beta), gap.new_full((), beta)
    small, large = torch.where(gap > 0, of_p, of_q), torch.where(gap > 0, of_q, of_p)
    below = -gap.abs()
    lost = small * torch.expm1(below)
    log_m = torch.where(lost > -0.5, lost.log1p(), (large + small * below.exp()).log())
    return gap.clamp(min=0) + log_m, gap.clamp(max=0) - log_m


def _transformed(
    raw: torch.Tensor, transform: Transform, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits `z` in `dtype`, and what the tanh gave; `raw` itself where nothing is done."""
    z, capped = raw.to(dtype), None
    if transform.softcap:
        capped = torch.tanh(z / transform.softcap)
        z = capped * (transform.softcap / transform.temperature)
    elif transform.temperature != 1:
        z = z / transform.temperature
    return z, capped


def _product(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`weights * values`; zero where the weight is. A column of -inf has no share."""
    return torch.where(weights == 0, 0.0, weights * values)


def _finite(max_C: torch.Tensor) -> torch.Tensor:
    """Where all columns are -inf, so is their maximum, and -inf - -inf would be NaN."""
    return torch.where(max_C == -torch.inf, 0.0, max_C)


def _pick(z: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    picked = z.gather(1, columns.clamp(min=0))
    return torch.where(columns >= 0, picked, 0.0)


def _scatter(grad: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
    here = torch.where(columns >= 0, values, 0.0)
    grad.scatter_add_(1, columns.clamp(min=0), here)


def _blocks(logits_Cv: torch.Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits_Cv.shape
    on_cpu = logits_Cv.device.type == "cpu"
    elements = CPU_BLOCK_ELEMENTS if on_cpu else GPU_BLOCK_ELEMENTS
    step = max(1, elements // max(1, num_columns))
    return (slice(start, start + step) for start in range(0, num_rows, step))
