"""The passes of `sweeps.py` as Triton kernels, for GPUs.

`C` tokens of a chunk, `K` candidates of each, `P` parts of a row that programs share, `W`
words that each leaves to the others, `v` this rank's columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchtitan_liger.head_loss.statistics import (
    SUMS,
    Coefficients,
    Partials,
    Sums,
    coefficients_of,
)
from torchtitan_liger.head_loss.sweeps import Logits, Transform
from torchtitan_liger.head_loss.triton_gradients import gradient_kernel, scale_kernel
from torchtitan_liger.head_loss.triton_mixture import mixture_kernel, origins_kernel
from torchtitan_liger.head_loss.triton_one_trip import (
    TEACHER_KINDS,
    one_trip_kernel,
)
from torchtitan_liger.head_loss.triton_statistics import statistics_kernel

# The fastest on an H200 of blocks from 256 to 8,192, 1 to 16 of them at a time, 2 to 32
# warps, with products between them. Times are for 4,096 rows of 128,256 in bfloat16, where
# a copy takes 491 us; in parentheses beside a teacher, for JSD and for forward KL. Products
# leave the clock so low that most of these wait for instructions.
STATISTICS_BLOCK, STATISTICS_UNROLL, STATISTICS_WARPS = 1024, 2, 4  # 292 (505, 590) us
GRADIENT_BLOCK, GRADIENT_BLOCKS, GRADIENT_WARPS = 1024, 8, 4  # 514 (776, 738) us
MIXTURE_COLUMNS, MIXTURE_BLOCK, MIXTURE_WARPS = 4096, 1024, 4  # 685, and gradient 1,070
MIXTURE_REGISTERS = 64  # of a thread, where a mixture is FAST: eight parts at a time
ORIGINS_BLOCK = 128
TRIP_COLUMNS, TRIP_BLOCK, TRIP_UNROLL, TRIP_GRADIENT_BLOCK = 6144, 512, 4, 2048
TRIP_WARPS = 2  # 16 parts share a multiprocessor, and its cache; 575 us (1,110 with KL)
SCALE_BLOCK, SCALE_BLOCKS = 2048, 16


def statistics_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    sums: Sums,
    *,
    candidates_CK: torch.Tensor | None = None,
    teacher: Logits | None = None,
) -> None:
    """As `sweeps.statistics_sweep`; needs `sums` to be rows of one tensor [k, C]."""
    num_rows, num_columns = logits_Cv.shape
    if num_rows == 0:
        return
    statistics_kernel[(num_rows,)](
        logits_Cv,
        logits_Cv.stride(0),
        num_columns,
        column_C,
        sums["max"],
        num_rows,
        candidates_CK,
        *_teacher_arguments(teacher),
        **_places(sums, SUMS),
        NUM_CANDIDATES=0 if candidates_CK is None else candidates_CK.shape[1],
        PAIRS=_in_pairs(logits_Cv, teacher),
        **_transforms(transform, teacher),
        **_tile(STATISTICS_BLOCK, STATISTICS_UNROLL, logits_Cv),
        num_warps=STATISTICS_WARPS,
    )


def one_trip_sweep(
    logits_Cv: torch.Tensor,
    column_C: torch.Tensor,
    transform: Transform,
    sums: Sums,
    partials: Partials,
    *,
    teacher: Logits | None = None,
) -> None:
    """As `sweeps.one_trip_sweep`; needs `sums` to be rows of one tensor [k, C]."""
    num_rows, num_columns = logits_Cv.shape
    if num_rows == 0:
        return
    can_wait = _can_wait(logits_Cv, sums["max"].dtype, TRIP_COLUMNS)
    most = TRIP_COLUMNS if can_wait else num_columns
    num_parts, part_columns = _parts(num_columns, most)
    words_CWP = logit_sums_PC = None
    if num_parts > 1:
        kinds = 1 if teacher is None else TEACHER_KINDS.value
        words_CWP = column_C.new_zeros(num_rows, kinds, num_parts)
    if "logit_sum" in sums:
        logit_sums_PC = sums["max"].new_empty(num_parts, num_rows)
    # The kernel itself knows the divergence that is in the coefficients of a reverse one.
    others = partials._replace(kl_rev=None)
    by = coefficients_of(others, None, sums, num_columns)
    by_rows = by.softmax, by.label, by.constant, by.teacher, partials.kl_rev
    unroll, gradient_block = TRIP_UNROLL, TRIP_GRADIENT_BLOCK
    if teacher is not None:  # as many registers for both
        unroll, gradient_block = unroll // 2, gradient_block // 2
    names = "max", "sumexp", "label_logit", "teacher_max", "teacher_sumexp"
    gaps = "teacher_shifted_sum", "student_gap", "teacher_gap"
    one_trip_kernel[(num_rows * num_parts,)](
        logits_Cv,
        logits_Cv.stride(0),
        num_columns,
        column_C,
        *_teacher_arguments(teacher),
        sums["max"],
        num_rows,
        *(None if x is None else x.contiguous() for x in by_rows),
        logit_sums_PC,
        words_CWP,
        num_parts,
        part_columns,
        MOST_PARTS=_most_parts(num_parts, TRIP_WARPS),
        **_places(sums, (*names, *gaps)),
        # The divergence of a reverse KL has no use for it.
        PAIRS=partials.kl_rev is None and _in_pairs(logits_Cv, teacher),
        **_transforms(transform, teacher),
        **_tile(TRIP_BLOCK, unroll, logits_Cv),
        GRADIENT_BLOCK=_block(gradient_block, num_columns),
        num_warps=TRIP_WARPS,
    )
    if logit_sums_PC is not None:
        torch.sum(logit_sums_PC, dim=0, out=sums["logit_sum"])


def _parts(num_columns: int, most: int) -> tuple[int, int]:
    """How many programs share a row, and how many columns each has."""
    num_parts = -(-num_columns // most)
    # Equal parts, but for where loads are aligned.
    part_columns = -(-num_columns // (num_parts * 64)) * 64
    return -(-num_columns // part_columns), part_columns


def _can_wait(logits_Cv: torch.Tensor, sums_dtype: torch.dtype, most: int) -> bool:
    """Whether a row's parts may wait for each other's words: they have to run at the same
    time, which they do not in Triton's interpreter. A word has room for two float32."""
    if not logits_Cv.is_cuda or sums_dtype != torch.float32:
        return False
    num_parts, _ = _parts(logits_Cv.shape[1], most)
    device = torch.cuda.get_device_properties(logits_Cv.device)
    return num_parts <= device.multi_processor_count  # each has room for one, at least


def _most_parts(num_parts: int, num_warps: int) -> int:
    """A power of two by which all that read the words agree on when all are there.

    With one for each lane a warp sees all of them, and decides alone. With one for each
    thread no two threads read the same word: one of two that do could see it too early,
    and its share of the sum be the one that counts.
    """
    if num_parts <= 32:
        return 32
    return max(1 << (num_parts - 1).bit_length(), 32 * num_warps)


def _is_fast(logits_Cv: torch.Tensor) -> bool:
    """Whether NVIDIA's own logarithm, to 2e-7, is far better than these logits are."""
    is_nvidia = logits_Cv.is_cuda and torch.version.hip is None
    return is_nvidia and logits_Cv.dtype.itemsize == 2


def _in_pairs(logits_Cv: torch.Tensor, teacher: Logits | None) -> bool:
    """Whether `load_ahead` may take columns by twos, which helps beside a teacher."""
    if teacher is None:
        return False
    both = logits_Cv, teacher.logits_Cv
    return logits_Cv.shape[1] % 2 == 0 and all(
        x.dtype == torch.bfloat16 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0
        for x in both
    )


def mixture_sweep(
    logits_Cv: torch.Tensor,
    transform: Transform,
    teacher: Logits,
    sums: Sums,
    beta: float,
) -> torch.Tensor:
    """As `sweeps.mixture_sweep`."""
    return _mixture_trip(logits_Cv, transform, teacher, sums, beta, None, None)


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
    """As `sweeps.mixture_gradient_sweep`; in two trips where the gradient needs more than
    the mixture, and where a row's parts cannot wait for each other."""
    by = coefficients
    others = by.square, by.teacher, by.log_teacher, by.candidates
    given = logits_Cv, transform, teacher, sums, jsd_beta
    is_complete = by.mixture is not None and all(x is None for x in others)
    in_one_trip = logits_Cv.shape[1] <= MIXTURE_COLUMNS or _can_wait(
        logits_Cv, sums["max"].dtype, MIXTURE_COLUMNS
    )
    if is_complete and in_one_trip:
        return _mixture_trip(*given, column_C, by)
    shares_2C = _mixture_trip(*given, None, None)
    gradient_sweep(
        logits_Cv,
        column_C,
        transform,
        by.with_mixture(shares_2C[0]),
        candidates_CK=candidates_CK,
        teacher=teacher,
        jsd_beta=jsd_beta,
    )
    return shares_2C


def _mixture_trip(
    logits_Cv: torch.Tensor,
    transform: Transform,
    teacher: Logits,
    sums: Sums,
    beta: float,
    column_C: torch.Tensor | None,
    by: Coefficients | None,
) -> torch.Tensor:
    """The shares, and by these coefficients the gradient."""
    num_rows, num_columns = logits_Cv.shape
    if num_rows == 0 or num_columns == 0:
        return sums["max"].new_zeros(2, num_rows)
    num_parts, part_columns = _parts(num_columns, MIXTURE_COLUMNS)
    shares_2PC = sums["max"].new_empty(2, num_parts, num_rows)
    words_CP = None
    by_rows: list[torch.Tensor | None] = [None] * 5
    if by is not None:
        by_rows = [by.softmax, by.label, by.log_softmax, by.constant, by.mixture]
        if num_parts > 1:
            words_CP = shares_2PC.new_zeros(num_rows, num_parts, dtype=torch.int64)
    softmaxes = [sums[x] for x in ("max", "sumexp", "teacher_max", "teacher_sumexp")]
    is_fast = _is_fast(logits_Cv)
    if is_fast:
        origins_4C = shares_2PC.new_empty(4, num_rows)
        origins_kernel[(-(-num_rows // ORIGINS_BLOCK),)](
            *softmaxes, origins_4C, num_rows, BLOCK=ORIGINS_BLOCK, num_warps=4
        )
        softmaxes = list(origins_4C)
    block = _block(MIXTURE_BLOCK, part_columns)
    mixture_kernel[(num_rows * num_parts,)](
        logits_Cv,
        logits_Cv.stride(0),
        num_columns,
        column_C,
        *_teacher_arguments(teacher),
        *softmaxes,
        shares_2PC,
        num_rows,
        *(None if x is None else x.contiguous() for x in by_rows),
        words_CP,
        num_parts,
        part_columns,
        MOST_PARTS=_most_parts(num_parts, MIXTURE_WARPS),
        BETA=beta,
        FAST=is_fast,
        PAIRS=_in_pairs(logits_Cv, teacher),
        **_transforms(transform, teacher),
        BLOCK=block,
        BLOCKS=-(-part_columns // block),
        num_warps=MIXTURE_WARPS,
        **({"maxnreg": MIXTURE_REGISTERS} if is_fast else {}),
    )
    return shares_2PC.sum(1)


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
    """As `sweeps.gradient_sweep`."""
    num_rows, num_columns = logits_Cv.shape
    if num_rows == 0 or num_columns == 0:
        return
    block = _block(GRADIENT_BLOCK, num_columns)
    by = coefficients
    if by.candidates is None:
        candidates_CK = None
    groups = -(-num_columns // (block * GRADIENT_BLOCKS))
    gradient_kernel[(num_rows * groups,)](
        logits_Cv,
        logits_Cv.stride(0),
        num_columns,
        column_C,
        candidates_CK,
        *_teacher_arguments(teacher if by.teacher_max is not None else None),
        *(None if x is None else x.contiguous() for x in by),
        groups,
        NUM_CANDIDATES=0 if candidates_CK is None else candidates_CK.shape[1],
        BETA=jsd_beta,
        FAST=_is_fast(logits_Cv),
        **_transforms(transform, teacher),
        BLOCK=block,
        BLOCKS=GRADIENT_BLOCKS,
        num_warps=GRADIENT_WARPS,
    )


def scale(grad: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """`out = grad * factor`; with `out` the same tensor and a factor of one, not a pass.

    torch's own makes a pass also by one, and a slow one to bfloat16.

    Args:
        grad: contiguous.
        factor: [1] in at least float32.
        out: contiguous, of any dtype.
    """
    if grad.numel():
        elements = SCALE_BLOCK * SCALE_BLOCKS
        scale_kernel[(-(-grad.numel() // elements),)](
            grad,
            factor,
            out,
            grad.numel(),
            IN_PLACE=grad.data_ptr() == out.data_ptr(),
            BLOCK=SCALE_BLOCK,
            BLOCKS=SCALE_BLOCKS,
            num_warps=GRADIENT_WARPS,
        )


def _places(sums: Sums, names: Sequence[str]) -> dict[str, int]:
    """In which row of their tensor these sums are; -1 for those that nobody asks for."""
    places = dict.fromkeys((f"AT_{name}" for name in names), -1)
    first = sums["max"]
    for name in sums.keys() & names:
        offset = sums[name].storage_offset() - first.storage_offset()
        places[f"AT_{name}"] = offset // first.numel()
    return places


def _block(most: int, num_columns: int) -> int:
    return max(16, min(most, 1 << (num_columns - 1).bit_length()))


def _tile(most: int, unroll: int, logits_Cv: torch.Tensor) -> dict[str, int]:
    """What `threads_tile` takes, for loads of 16 bytes."""
    num_columns = logits_Cv.shape[1]
    block = _block(most, num_columns)
    return {
        "BLOCK": block,
        "UNROLL": unroll if num_columns > block else 1,
        "VECTOR": 16 // logits_Cv.dtype.itemsize,
    }


def _transforms(transform: Transform, teacher: Logits | None) -> dict[str, Transform]:
    # As constants: an argument would be rounded to float32.
    return {
        "TRANSFORM": transform,
        "TEACHER_TRANSFORM": Transform() if teacher is None else teacher.transform,
    }


def _teacher_arguments(teacher: Logits | None) -> tuple[Any, int]:
    if teacher is None:
        return None, 0
    return teacher.logits_Cv, teacher.logits_Cv.stride(0)
