"""Triton kernels that read logits and leave sums.

One program per row. What has no place in the sums is compiled away, so what no term asks
for costs nothing.
"""

import triton
import triton.language as tl

from torchtitan_liger.head_loss.triton_blocks import (
    LN_2,
    at_least_one,
    bits_above,
    bits_to,
    finite,
    followed,
    load_ahead,
    load_logit,
    moved_sum,
    origin_of,
    product,
    product_of_bits,
    rescaled,
    sum_of,
    threads_tile,
    to_logits,
    widened,
)


@triton.jit
def statistics_kernel(
    logits,
    stride,
    num_columns,
    label_columns,
    sums,
    num_rows,
    candidates,
    teacher,
    teacher_stride,
    AT_max: tl.constexpr,
    AT_sumexp: tl.constexpr,
    AT_label_logit: tl.constexpr,
    AT_logit_sum: tl.constexpr,
    AT_shifted_sum: tl.constexpr,
    AT_square_sum: tl.constexpr,
    AT_teacher_max: tl.constexpr,
    AT_teacher_sumexp: tl.constexpr,
    AT_teacher_shifted_sum: tl.constexpr,
    AT_student_gap: tl.constexpr,
    AT_teacher_gap: tl.constexpr,
    AT_candidate_logits: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    PAIRS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    sums += row
    if AT_teacher_max >= 0:
        teacher += row * teacher_stride
    dtype: tl.constexpr = sums.dtype.element_ty
    (
        maxima,
        sumexps,
        logit_sum,
        shifted_sums,
        square_sums,
        t_maxima,
        t_sumexps,
        t_shifted_sums,
        student_gaps,
        teacher_gaps,
    ) = threads_sums(
        logits,
        teacher,
        0,
        num_columns,
        dtype,
        AT_logit_sum >= 0,
        AT_shifted_sum >= 0,
        AT_square_sum >= 0,
        AT_teacher_max >= 0,
        AT_teacher_shifted_sum >= 0,
        AT_student_gap >= 0,
        AT_teacher_gap >= 0,
        PAIRS,
        TRANSFORM,
        TEACHER_TRANSFORM,
        BLOCK,
        UNROLL,
        VECTOR,
    )

    maximum, base, shifts, sumexp = together(maxima, sumexps)
    at = sums + AT_max * num_rows, sums + AT_sumexp * num_rows
    bits, to_max = store_softmax(*at, maximum, base, sumexp)
    if AT_logit_sum >= 0:
        tl.store(sums + AT_logit_sum * num_rows, tl.sum(logit_sum, axis=0))
    if AT_shifted_sum >= 0:
        gap = gap_together(shifted_sums, sumexps, shifts, 0.0)
        store_gap(sums + AT_shifted_sum * num_rows, gap, bits, sumexp, to_max)
    if AT_square_sum >= 0:
        to_base = tl.exp2(shifts)
        square_sum = tl.sum(rescaled(square_sums, to_base * to_base), axis=0)
        tl.store(sums + AT_square_sum * num_rows, square_sum * to_max * to_max)
    if AT_teacher_max >= 0:
        t_maximum, t_base, t_shifts, t_sumexp = together(t_maxima, t_sumexps)
        at = sums + AT_teacher_max * num_rows, sums + AT_teacher_sumexp * num_rows
        t_bits, t_to_max = store_softmax(*at, t_maximum, t_base, t_sumexp)
        if AT_teacher_shifted_sum >= 0:
            gap = gap_together(t_shifted_sums, t_sumexps, t_shifts, 0.0)
            at = sums + AT_teacher_shifted_sum * num_rows
            store_gap(at, gap, t_bits, t_sumexp, t_to_max)
        if AT_student_gap >= 0:
            gap = gap_together(student_gaps, sumexps, shifts, t_shifts)
            at = sums + AT_student_gap * num_rows
            store_gap(at, gap, bits - t_bits, sumexp, to_max)
        if AT_teacher_gap >= 0:
            gap = gap_together(teacher_gaps, t_sumexps, t_shifts, shifts)
            at = sums + AT_teacher_gap * num_rows
            store_gap(at, gap, t_bits - bits, t_sumexp, t_to_max)
    label = tl.load(label_columns + row)
    _raw, z = load_logit(logits, label, dtype, TRANSFORM)
    tl.store(sums + AT_label_logit * num_rows, z)
    for k in tl.static_range(NUM_CANDIDATES):
        column = tl.load(candidates + row * NUM_CANDIDATES + k)
        _raw, z = load_logit(logits, column, dtype, TRANSFORM)
        tl.store(sums + (AT_candidate_logits + k) * num_rows, z)


@triton.jit
def threads_sums(
    logits,
    teacher,
    begin,
    end,
    dtype: tl.constexpr,
    WITH_logit_sum: tl.constexpr,
    WITH_shifted_sum: tl.constexpr,
    WITH_square_sum: tl.constexpr,
    WITH_teacher: tl.constexpr,
    WITH_teacher_shifted_sum: tl.constexpr,
    WITH_student_gap: tl.constexpr,
    WITH_teacher_gap: tl.constexpr,
    PAIRS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Each thread's maximum and sums over its share of a row's columns.

    They are above the origin of the thread's own maximum, and what is summed beside
    exponentials is in bits.
    """
    tile = threads_tile(BLOCK, UNROLL, VECTOR)
    ahead = threads_tile(BLOCK // 2, UNROLL, VECTOR // 2) if PAIRS else tile
    zeros = tl.zeros([BLOCK // VECTOR], dtype)
    maximum = zeros - float("inf")
    origin = maximum
    sumexp = zeros
    logit_sum = zeros
    shifted_sum = zeros
    square_sum = zeros
    t_maximum = maximum
    t_origin = maximum
    t_sumexp = zeros
    t_shifted_sum = zeros
    student_gap = zeros
    teacher_gap = zeros
    raw = load_ahead(logits, begin, ahead, None, end, PAIRS)
    if WITH_teacher:
        t_raw = load_ahead(teacher, begin, ahead, None, end, PAIRS)

    for start in range(begin, end, BLOCK * UNROLL):
        columns = start + tile
        following = start + BLOCK * UNROLL  # on its way while others compute
        this = widened(raw, PAIRS)
        z = to_logits(this, dtype, columns, end, TRANSFORM)
        raw = load_ahead(logits, following, ahead, None, end, PAIRS)
        maximum, origin, base, shift = followed(maximum, origin, z)
        rescale = tl.exp2(shift)
        shifted = bits_above(base[:, None, None], z)
        exp = tl.exp2(shifted)
        if WITH_teacher:
            t_this = widened(t_raw, PAIRS)
            v = to_logits(t_this, dtype, columns, end, TEACHER_TRANSFORM)
            t_raw = load_ahead(teacher, following, ahead, None, end, PAIRS)
            t_maximum, t_origin, t_base, t_shift = followed(t_maximum, t_origin, v)
            t_rescale = tl.exp2(t_shift)
            t_shifted = bits_above(t_base[:, None, None], v)
            t_exp = tl.exp2(t_shifted)
            if WITH_student_gap:
                student_gap = moved_sum(student_gap, shift - t_shift, sumexp, rescale)
                student_gap += sum_of(product(exp, shifted - t_shifted))
            if WITH_teacher_gap:
                by = t_shift - shift
                teacher_gap = moved_sum(teacher_gap, by, t_sumexp, t_rescale)
                teacher_gap += sum_of(product(t_exp, t_shifted - shifted))
            if WITH_teacher_shifted_sum:
                t_shifted_sum = moved_sum(t_shifted_sum, t_shift, t_sumexp, t_rescale)
                t_shifted_sum += sum_of(product_of_bits(t_exp, t_shifted))
            t_sumexp = rescaled(t_sumexp, t_rescale) + sum_of(t_exp)
        if WITH_shifted_sum:
            shifted_sum = moved_sum(shifted_sum, shift, sumexp, rescale)
            shifted_sum += sum_of(product_of_bits(exp, shifted))
        if WITH_square_sum:
            square_sum = rescaled(square_sum, rescale * rescale) + sum_of(exp * exp)
        if WITH_logit_sum:
            logit_sum += sum_of(tl.where(columns < end, z, 0.0))
        sumexp = rescaled(sumexp, rescale) + sum_of(exp)
    return (
        maximum,
        sumexp,
        logit_sum,
        shifted_sum,
        square_sum,
        t_maximum,
        t_sumexp,
        t_shifted_sum,
        student_gap,
        teacher_gap,
    )


@triton.jit
def together(maxima, sumexps):
    """Of several parts of a row: the maximum, an origin above it, how far the parts' origins
    are above that one, and the sum of exponentials above it."""
    maximum = tl.max(maxima, axis=0)
    base = finite(origin_of(maximum))
    shifts = origin_of(maxima) - base
    # Of -inf, which nothing has, no share.
    return maximum, base, shifts, tl.sum(rescaled(sumexps, tl.exp2(shifts)), axis=0)


@triton.jit
def gap_together(gaps, sumexps, shifts, other_shifts):
    """Of several parts of a row: the sum of exponentials times how far one exponent is above
    the other, each above its origin."""
    moved = moved_sum(gaps, shifts - other_shifts, sumexps, tl.exp2(shifts))
    return tl.sum(moved, axis=0)


@triton.jit
def store_softmax(at_max, at_sumexp, maximum, base, sumexp):
    """The maximum, and the sum above it; how far the origin is above it, in bits, and the
    factor from there."""
    bits, to_max = bits_to(base, finite(maximum))
    tl.store(at_max, maximum)
    tl.store(at_sumexp, at_least_one(sumexp * to_max, maximum))
    return bits, to_max


@triton.jit
def store_gap(at, gap, bits, sumexp, to_max):
    """A sum of `gap_together` above the maxima, `bits` from the origins."""
    tl.store(at, moved_sum(gap, bits, sumexp, to_max) * LN_2)
