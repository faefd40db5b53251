"""The Triton kernel of a row whose gradient needs nothing but the row: sums and gradient in
one trip to memory."""

import triton
import triton.language as tl

from torchtitan_liger.head_loss.triton_blocks import (
    LN_2,
    bits_above,
    load_ahead,
    load_logit,
    load_optional,
    product,
    store_gradient,
    to_logits,
    widened,
)
from torchtitan_liger.head_loss.triton_statistics import (
    gap_together,
    store_gap,
    store_softmax,
    threads_sums,
    together,
)
from torchtitan_liger.head_loss.triton_words import (
    leave,
    number_word,
    numbers_left,
    sum_word,
    sums_left,
)

# The words that each part of a row leaves to the others, by kind.
SUM, TEACHER_SUM = tl.constexpr(0), tl.constexpr(1)
STUDENT_GAP, TEACHER_GAP = tl.constexpr(2), tl.constexpr(3)
TEACHER_SHIFTED_SUM = tl.constexpr(4)
TEACHER_KINDS = tl.constexpr(5)


@triton.jit
def one_trip_kernel(
    logits,
    stride,
    num_columns,
    label_columns,
    teacher,
    teacher_stride,
    sums,
    num_rows,
    by_softmax,
    by_label,
    by_constant,
    by_teacher,
    by_kl_rev,
    logit_sums,
    words,
    num_parts,
    part_columns,
    MOST_PARTS: tl.constexpr,
    AT_max: tl.constexpr,
    AT_sumexp: tl.constexpr,
    AT_label_logit: tl.constexpr,
    AT_teacher_max: tl.constexpr,
    AT_teacher_sumexp: tl.constexpr,
    AT_teacher_shifted_sum: tl.constexpr,
    AT_student_gap: tl.constexpr,
    AT_teacher_gap: tl.constexpr,
    PAIRS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    GRADIENT_BLOCK: tl.constexpr,
):
    """Sums and gradient of what is in `statistics.IN_ONE_TRIP`.

    `sums` are rows of [k, num_rows], of which each `AT_` names one; -1 is nobody's.
    `words` are zeros [num_rows, kinds, num_parts] in int64, or None for a single part.

    A row's parts are programs that run side by side, so that a part is in a near cache when
    it is read again: each leaves its maxima and sums in words and waits for the others'.
    """
    program = tl.program_id(0)
    row = (program // num_parts).to(tl.int64)
    part = program % num_parts
    logits += row * stride
    sums += row
    WITH_TEACHER: tl.constexpr = AT_teacher_max >= 0
    LEARNS: tl.constexpr = (by_teacher is not None) or (by_kl_rev is not None)
    if WITH_TEACHER:
        teacher += row * teacher_stride
    begin = part * part_columns
    end = tl.minimum(begin + part_columns, num_columns)
    dtype: tl.constexpr = sums.dtype.element_ty

    column = tl.load(label_columns + row).to(tl.int32)
    c_softmax = tl.load(by_softmax + row)
    c_label = tl.load(by_label + row)
    (
        maxima,
        sumexps,
        logit_sum,
        _shifted_sums,
        _square_sums,
        t_maxima,
        t_sumexps,
        t_shifted_sums,
        student_gaps,
        teacher_gaps,
    ) = threads_sums(
        logits,
        teacher,
        begin,
        end,
        dtype,
        logit_sums is not None,
        False,
        False,
        WITH_TEACHER,
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
    if WITH_TEACHER:
        t_maximum, t_base, t_shifts, t_sumexp = together(t_maxima, t_sumexps)
        student_gap = gap_together(student_gaps, sumexps, shifts, t_shifts)
        teacher_gap = gap_together(teacher_gaps, t_sumexps, t_shifts, shifts)
        t_shifted_sum = gap_together(t_shifted_sums, t_sumexps, t_shifts, 0.0)
    here = (column >= begin) & (column < end)
    label_column = tl.where(here, column, -1)
    label_raw, label_logit = load_logit(logits, label_column, dtype, TRANSFORM)
    tl.debug_barrier()  # all threads have read what is overwritten below
    if words is not None:
        words += row * num_parts * (TEACHER_KINDS if WITH_TEACHER else 1)
        leave(words, SUM, num_parts, part, sum_word(maximum, sumexp))
        if WITH_TEACHER:
            leave(words, TEACHER_SUM, num_parts, part, sum_word(t_maximum, t_sumexp))
            if AT_student_gap >= 0:
                leave(words, STUDENT_GAP, num_parts, part, number_word(student_gap))
            if AT_teacher_gap >= 0:
                leave(words, TEACHER_GAP, num_parts, part, number_word(teacher_gap))
            if AT_teacher_shifted_sum >= 0:
                word = number_word(t_shifted_sum)
                leave(words, TEACHER_SHIFTED_SUM, num_parts, part, word)
    if logit_sums is not None:
        tl.store(logit_sums + part * num_rows + row, tl.sum(logit_sum, axis=0))
    if here | ((part == 0) & (column < 0)):
        tl.store(sums + AT_label_logit * num_rows, label_logit)
    # The columns that were read last are in the nearest cache.
    num_blocks = tl.cdiv(end - begin, GRADIENT_BLOCK)
    block = tl.arange(0, GRADIENT_BLOCK)
    ahead = tl.arange(0, GRADIENT_BLOCK // 2) if PAIRS else block
    last = begin + (num_blocks - 1) * GRADIENT_BLOCK
    raw = load_ahead(logits, last, ahead, None, end, PAIRS)
    if LEARNS:
        t_raw = load_ahead(teacher, last, ahead, None, end, PAIRS)
    if words is not None:
        maxima, sumexps = sums_left(words, SUM, num_parts, MOST_PARTS)
        maximum, base, shifts, sumexp = together(maxima, sumexps)
        if WITH_TEACHER:
            t_maxima, t_sumexps = sums_left(words, TEACHER_SUM, num_parts, MOST_PARTS)
            t_maximum, t_base, t_shifts, t_sumexp = together(t_maxima, t_sumexps)
            if AT_student_gap >= 0:
                student_gaps = numbers_left(words, STUDENT_GAP, num_parts, MOST_PARTS)
                student_gap = gap_together(student_gaps, sumexps, shifts, t_shifts)
            if AT_teacher_gap >= 0:
                teacher_gaps = numbers_left(words, TEACHER_GAP, num_parts, MOST_PARTS)
                teacher_gap = gap_together(teacher_gaps, t_sumexps, t_shifts, shifts)
            if AT_teacher_shifted_sum >= 0:
                gaps = numbers_left(words, TEACHER_SHIFTED_SUM, num_parts, MOST_PARTS)
                t_shifted_sum = gap_together(gaps, t_sumexps, t_shifts, 0.0)
    if part == 0:
        at = sums + AT_max * num_rows, sums + AT_sumexp * num_rows
        bits, to_max = store_softmax(*at, maximum, base, sumexp)
        if WITH_TEACHER:
            at = sums + AT_teacher_max * num_rows, sums + AT_teacher_sumexp * num_rows
            t_bits, t_to_max = store_softmax(*at, t_maximum, t_base, t_sumexp)
            if AT_student_gap >= 0:
                at = sums + AT_student_gap * num_rows
                store_gap(at, student_gap, bits - t_bits, sumexp, to_max)
            if AT_teacher_gap >= 0:
                at = sums + AT_teacher_gap * num_rows
                store_gap(at, teacher_gap, t_bits - bits, t_sumexp, t_to_max)
            if AT_teacher_shifted_sum >= 0:
                at = sums + AT_teacher_shifted_sum * num_rows
                store_gap(at, t_shifted_sum, t_bits, t_sumexp, t_to_max)

    factor = c_softmax / sumexp
    slope, t_factor = 0.0, 0.0
    if by_kl_rev is not None:
        slope = tl.load(by_kl_rev + row) * LN_2 / sumexp
        factor -= slope * (student_gap / sumexp)
    if by_teacher is not None:
        t_factor = tl.load(by_teacher + row) / t_sumexp
    c_constant = load_optional(by_constant, row)
    for i in range(0, num_blocks):
        first = begin + (num_blocks - 1 - i) * GRADIENT_BLOCK
        columns, before = first + block, first - GRADIENT_BLOCK
        this = widened(raw, PAIRS)
        z = to_logits(this, dtype, columns, end, TRANSFORM)
        raw = load_ahead(logits, before, ahead, begin, None, PAIRS)
        bits = bits_above(base, z)
        t_bits = bits
        if LEARNS:
            t_this = widened(t_raw, PAIRS)
            v = to_logits(t_this, dtype, columns, end, TEACHER_TRANSFORM)
            t_raw = load_ahead(teacher, before, ahead, begin, None, PAIRS)
            t_bits = bits_above(t_base, v)
        grad = _dense(bits, t_bits, factor, slope, t_factor, by_kl_rev, by_teacher)
        grad += c_constant
        store_gradient(logits, columns, end, grad, this, TRANSFORM)
    if here:
        tl.debug_barrier()  # the label's comes last
        bits = bits_above(base, label_logit)
        t_bits = bits
        if LEARNS:
            _raw, v = load_logit(teacher, column, dtype, TEACHER_TRANSFORM)
            t_bits = bits_above(t_base, v)
        grad = _dense(bits, t_bits, factor, slope, t_factor, by_kl_rev, by_teacher)
        grad += c_constant + c_label
        store_gradient(logits, column, end, grad, label_raw, TRANSFORM)


@triton.jit
def _dense(bits, t_bits, factor, slope, t_factor, by_kl_rev, by_teacher):
    """What every column has of the gradient, but for a constant."""
    exp = tl.exp2(bits)
    grad = exp * factor  # also of 0, which a NaN must outlast
    if by_kl_rev is not None:
        grad += product(exp, slope * (bits - t_bits))
    if by_teacher is not None:
        grad += tl.exp2(t_bits) * t_factor
    return grad
