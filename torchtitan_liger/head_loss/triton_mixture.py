"""The Triton kernel of a JSD: how far a row is from its mixture with a teacher, and the
gradient, in one trip to memory."""

import triton
import triton.language as tl

from torchtitan_liger.head_loss.triton_blocks import (
    LN_2,
    around_one,
    bits_above,
    counted,
    finite,
    load_ahead,
    load_optional,
    log2_of,
    store_gradient,
    to_logits,
    to_mixture,
    widened,
)
from torchtitan_liger.head_loss.triton_words import leave, number_word, numbers_left

# The words that each part of a row leaves to the others, by kind.
STUDENT_KL, TEACHER_KL = tl.constexpr(0), tl.constexpr(1)
MIXTURE_KINDS = tl.constexpr(2)


@triton.jit
def mixture_kernel(
    logits,
    stride,
    num_columns,
    label_columns,
    teacher,
    teacher_stride,
    maxima,
    sumexps,
    teacher_maxima,
    teacher_sumexps,
    shares,
    num_rows,
    by_softmax,
    by_label,
    by_log_softmax,
    by_constant,
    by_mixture,
    words,
    num_parts,
    part_columns,
    MOST_PARTS: tl.constexpr,
    BETA: tl.constexpr,
    FAST: tl.constexpr,
    PAIRS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KL(p | m) and KL(q | m) in `shares` [2, num_rows]; with `by_softmax`, the gradient
    where the logits were, for which `by_softmax` lacks `by_mixture * KL(p | m)`.

    `words` are zeros [num_rows, kinds, num_parts] in int64, or None for a single part: as
    in `one_trip_kernel`.
    """
    # The first programs have the last rows, which were read last and may be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // num_parts).to(tl.int64)
    part = program % num_parts
    logits += row * stride
    teacher += row * teacher_stride
    begin = part * part_columns
    end = tl.minimum(begin + part_columns, num_columns)
    dtype: tl.constexpr = shares.dtype.element_ty
    # By which `_bits` makes a softmax of logits.
    at, by = finite(tl.load(maxima + row)), tl.load(sumexps + row)
    t_at, t_by = finite(tl.load(teacher_maxima + row)), tl.load(teacher_sumexps + row)
    inverse = 1.0
    if FAST:  # the student's normalizer is left for the end, and from the teacher
        at, inverse = around_one(at, by)
        t_at, t_inverse = around_one(t_at, t_by)
        t_by = tl.log2(t_inverse / inverse)

    softmaxes = at, by, t_at, t_by
    block = tl.arange(0, BLOCK)
    tile = tl.arange(0, BLOCK // 2) if PAIRS else block
    student_kls = tl.zeros([BLOCK], dtype)
    teacher_kls = tl.zeros([BLOCK], dtype)
    raw = load_ahead(logits, begin, tile, None, end, PAIRS)
    t_raw = load_ahead(teacher, begin, tile, None, end, PAIRS)
    for start in range(begin, end, BLOCK):
        this, t_this = widened(raw, PAIRS), widened(t_raw, PAIRS)
        raw = load_ahead(logits, start + BLOCK, tile, None, end, PAIRS)
        t_raw = load_ahead(teacher, start + BLOCK, tile, None, end, PAIRS)
        bits, t_bits = _bits(
            this,
            t_this,
            dtype,
            start + block,
            end,
            softmaxes,
            FAST,
            TRANSFORM,
            TEACHER_TRANSFORM,
        )
        p, q, m_by_p, q_by_m = to_mixture(counted(bits), t_bits, BETA, FAST)
        student_kls -= p * m_by_p
        teacher_kls += q * q_by_m
    student_kl = tl.sum(student_kls, axis=0) * inverse
    teacher_kl = tl.sum(teacher_kls, axis=0) * inverse
    if by_softmax is not None:
        column = tl.load(label_columns + row).to(tl.int32)
        here = (column >= begin) & (column < end)
        label_column = tl.where(here, column, begin)
        label_raw = tl.load(logits + label_column)
        t_label_raw = tl.load(teacher + label_column)
    tl.debug_barrier()  # all threads have read what is overwritten below
    if words is not None:
        words += row * num_parts * MIXTURE_KINDS
        leave(words, STUDENT_KL, num_parts, part, number_word(student_kl))
        leave(words, TEACHER_KL, num_parts, part, number_word(teacher_kl))
    # The columns that were read last are in the nearest cache.
    num_blocks = tl.cdiv(end - begin, BLOCK)
    if by_softmax is not None:
        last = begin + (num_blocks - 1) * BLOCK
        raw = load_ahead(logits, last, tile, None, end, PAIRS)
        t_raw = load_ahead(teacher, last, tile, None, end, PAIRS)
    if words is not None:
        parts = numbers_left(words, STUDENT_KL, num_parts, MOST_PARTS)
        student_kl = tl.sum(parts, axis=0)
        parts = numbers_left(words, TEACHER_KL, num_parts, MOST_PARTS)
        teacher_kl = tl.sum(parts, axis=0)
    if part == 0:
        tl.store(shares + row, student_kl * LN_2)
        tl.store(shares + num_rows + row, teacher_kl * LN_2)

    if by_softmax is not None:
        c_label = tl.load(by_label + row)
        c_constant = load_optional(by_constant, row)
        c_mixture = tl.load(by_mixture + row) * LN_2
        c_log_softmax = load_optional(by_log_softmax, row) * LN_2
        c_softmax = tl.load(by_softmax + row) + c_mixture * student_kl
        if FAST:
            c_softmax += c_log_softmax * tl.log2(inverse)
            c_softmax, c_mixture = c_softmax * inverse, c_mixture * inverse
            c_log_softmax *= inverse
        factors = c_softmax, c_log_softmax, c_constant, c_mixture
        for i in range(0, num_blocks):
            first = begin + (num_blocks - 1 - i) * BLOCK
            columns = first + block
            this, t_this = widened(raw, PAIRS), widened(t_raw, PAIRS)
            raw = load_ahead(logits, first - BLOCK, tile, begin, None, PAIRS)
            t_raw = load_ahead(teacher, first - BLOCK, tile, begin, None, PAIRS)
            grad = _gradient(
                this,
                t_this,
                dtype,
                columns,
                end,
                softmaxes,
                factors,
                by_log_softmax,
                BETA,
                FAST,
                TRANSFORM,
                TEACHER_TRANSFORM,
            )
            store_gradient(logits, columns, end, grad, this, TRANSFORM)
        if here:
            tl.debug_barrier()  # the label's comes last
            grad = _gradient(
                label_raw,
                t_label_raw,
                dtype,
                column,
                end,
                softmaxes,
                factors,
                by_log_softmax,
                BETA,
                FAST,
                TRANSFORM,
                TEACHER_TRANSFORM,
            )
            grad += c_label
            store_gradient(logits, column, end, grad, label_raw, TRANSFORM)


@triton.jit
def _gradient(
    raw,
    t_raw,
    dtype: tl.constexpr,
    columns,
    end,
    softmaxes,
    factors,
    by_log_softmax,
    BETA: tl.constexpr,
    FAST: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_TRANSFORM: tl.constexpr,
):
    """By the logits, but for the label's share."""
    bits, t_bits = _bits(
        raw,
        t_raw,
        dtype,
        columns,
        end,
        softmaxes,
        FAST,
        TRANSFORM,
        TEACHER_TRANSFORM,
    )
    _p, _q, m_by_p, _q_by_m = to_mixture(counted(bits), t_bits, BETA, FAST)
    c_softmax, c_log_softmax, c_constant, c_mixture = factors
    factor = c_softmax + c_mixture * m_by_p
    if by_log_softmax is not None:
        factor += c_log_softmax * counted(bits)
    return tl.exp2(bits) * factor + c_constant


@triton.jit
def _bits(
    raw,
    t_raw,
    dtype: tl.constexpr,
    columns,
    end,
    softmaxes,
    FAST: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_TRANSFORM: tl.constexpr,
):
    """log2 of both softmaxes, if FAST without the student's normalizer; the teacher's is
    `counted`."""
    z = to_logits(raw, dtype, columns, end, TRANSFORM)
    v = to_logits(t_raw, dtype, columns, end, TEACHER_TRANSFORM)
    at, by, t_at, t_by = softmaxes
    if FAST:
        return bits_above(at, z), counted(bits_above(t_at, v) + t_by)
    return log2_of(z, at, by), counted(log2_of(v, t_at, t_by))
