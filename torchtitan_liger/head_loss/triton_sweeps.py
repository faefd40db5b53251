"""The passes of `sweeps.py` as Triton kernels, for GPUs."""

from __future__ import annotations

import math
from typing import Any

import torch

import torchtitan_liger.head_loss.triton_kernels as triton_kernels
from torchtitan_liger.head_loss.statistics import SUMS, Coefficients, Sums
from torchtitan_liger.head_loss.sweeps import TeacherLogits, Transform

# The fastest on an H200 of blocks from 512 to 8,192, 1 to 8 of them at a time, 2 to 8
# warps: 305 and 589 us for 4,096 rows of 128,256 in bfloat16, where a copy takes 499.
STATISTICS_BLOCK, STATISTICS_UNROLL, STATISTICS_WARPS = 512, 8, 4
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def statistics_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    sums: Sums,
    *,
    candidates_CK: torch.Tensor | None = None,
    teacher: TeacherLogits | None = None,
) -> None:
    """As `sweeps.statistics_sweep`; needs `sums` to be rows of one tensor [k, C]."""
    num_rows, num_columns = logits_Cv.shape
    packed = sums["max"]
    places = {f"AT_{name}": -1 for name in SUMS}
    for name, x in sums.items():
        offset = x.storage_offset() - packed.storage_offset()
        places[f"AT_{name}"] = offset // max(1, num_rows)
    if num_rows == 0:
        return
    block = _block(STATISTICS_BLOCK, num_columns)
    triton_kernels.statistics_kernel[(num_rows,)](
        logits_Cv,
        logits_Cv.stride(0),
        num_columns,
        column_C,
        packed,
        num_rows,
        candidates_CK,
        *_teacher_arguments(teacher),
        **places,
        NUM_CANDIDATES=0 if candidates_CK is None else candidates_CK.shape[1],
        **_transforms(transform, teacher),
        BLOCK=block,
        UNROLL=max(1, min(STATISTICS_UNROLL, -(-num_columns // block))),
        num_warps=STATISTICS_WARPS,
    )


def mixture_sweep(
    logits_Cv: torch.Tensor,
    transform: Transform,
    teacher: TeacherLogits,
    sums: Sums,
    beta: float,
) -> torch.Tensor:
    """As `sweeps.mixture_sweep`."""
    num_rows, num_columns = logits_Cv.shape
    shares_2C = sums["max"].new_zeros(2, num_rows)
    if shares_2C.numel() and num_columns:
        triton_kernels.mixture_kernel[(num_rows,)](
            logits_Cv,
            logits_Cv.stride(0),
            num_columns,
            *_teacher_arguments(teacher),
            sums["max"],
            sums["sumexp"],
            sums["teacher_max"],
            sums["teacher_sumexp"],
            shares_2C,
            num_rows,
            **_log_shares(beta),
            **_transforms(transform, teacher),
            BLOCK=_block(STATISTICS_BLOCK, num_columns),
            num_warps=STATISTICS_WARPS,
        )
    return shares_2C


def gradient_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    coefficients: Coefficients,
    *,
    candidates_CK: torch.Tensor | None = None,
    teacher: TeacherLogits | None = None,
    jsd_beta: float = 0.5,
) -> None:
    """As `sweeps.gradient_sweep`."""
    num_rows, num_columns = logits_Cv.shape
    if num_rows == 0 or num_columns == 0:
        return
    block = _block(GRADIENT_BLOCK, num_columns)
    by = coefficients
    if by.candidates is None:
        candidates_CK = None
    triton_kernels.gradient_kernel[(num_rows, -(-num_columns // block))](
        logits_Cv,
        logits_Cv.stride(0),
        num_columns,
        column_C,
        candidates_CK,
        *_teacher_arguments(teacher if by.teacher_max is not None else None),
        *(None if x is None else x.contiguous() for x in by),
        NUM_CANDIDATES=0 if candidates_CK is None else candidates_CK.shape[1],
        **_log_shares(jsd_beta),
        **_transforms(transform, teacher),
        BLOCK=block,
        num_warps=GRADIENT_WARPS,
    )


def scale(grad: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """`out = grad * factor`; with `out` the same tensor and a factor of one, not a pass.

    Args:
        grad: contiguous.
        factor: [1] in at least float32.
        out: contiguous, of any dtype.
    """
    if grad.numel():
        block = 4096
        triton_kernels.scale_kernel[(-(-grad.numel() // block),)](
            grad,
            factor,
            out,
            grad.numel(),
            IN_PLACE=grad.data_ptr() == out.data_ptr(),
            BLOCK=block,
            num_warps=GRADIENT_WARPS,
        )


def _block(most: int, num_columns: int) -> int:
    return max(16, min(most, 1 << (num_columns - 1).bit_length()))


def _transforms(transform: Transform, teacher: TeacherLogits | None) -> dict[str, Any]:
    other = Transform() if teacher is None else teacher.transform
    # As constants: an argument would be rounded to float32.
    return {
        "SOFTCAP": transform.softcap,
        "TEMPERATURE": transform.temperature,
        "TEACHER_SOFTCAP": other.softcap,
        "TEACHER_TEMPERATURE": other.temperature,
    }


def _teacher_arguments(teacher: TeacherLogits | None) -> tuple[Any, int]:
    if teacher is None:
        return None, 0
    return teacher.logits_Cv, teacher.logits_Cv.stride(0)


def _log_shares(beta: float) -> dict[str, float]:
    inside = 0 < beta < 1
    return {
        "LOG_STUDENT": math.log1p(-beta) if inside else 0.0,
        "LOG_TEACHER": math.log(beta) if inside else 0.0,
    }
