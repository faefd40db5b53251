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

STUDENT_KL = tl.constexpr(0)  # the only kind of word that a part leaves to the others


@triton.jit
def origins_kernel(
    maxima,
    sumexps,
    teacher_maxima,
    teacher_sumexps,
    origins,
    num_rows,
    BLOCK: tl.constexpr,
):
    """What a FAST mixture takes for the four, in `origins` [4, num_rows]: by itself, as
    each part of a row would have to compute it again, in float64."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    maximum = tl.load(maxima + rows, inside, other=0.0)
    origin, inverse = around_one(finite(maximum), tl.load(sumexps + rows, inside))
    t_maximum = tl.load(teacher_maxima + rows, inside, other=0.0)
    t_sumexp = tl.load(teacher_sumexps + rows, inside)
    t_origin, t_inverse = around_one(finite(t_maximum), t_sumexp)
    # The student's normalizer is left for the end, and from the teacher.
    bits = tl.log2(t_inverse.to(tl.float64) / inverse.to(tl.float64))
    tl.store(origins + rows, origin, inside)
    tl.store(origins + num_rows + rows, inverse, inside)
    tl.store(origins + 2 * num_rows + rows, t_origin, inside)
    tl.store(origins + 3 * num_rows + rows, bits.to(tl.float32), inside)


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
    BLOCKS: tl.constexpr,
):
    """Each part's KL(p | m) and KL(q | m) in `shares` [2, num_parts, num_rows]; with
    `by_softmax`, the gradient where the logits were, for which `by_softmax` lacks
    `by_mixture * KL(p | m)`.

    A part's mixture stays in registers while the others' words come. `words` are zeros
    [num_rows, num_parts] in int64, or None for a single part (see `one_trip_kernel`). If
    FAST, maxima and sums of exponentials are what `origins_kernel` makes of them.
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
    inverse = by if FAST else 1.0
    if by_softmax is not None:
        column = tl.load(label_columns + row).to(tl.int32)
        c_label = tl.load(by_label + row)
        c_constant = load_optional(by_constant, row)
        c_mixture = tl.load(by_mixture + row) * LN_2
        c_log_softmax = load_optional(by_log_softmax, row) * LN_2
        c_softmax = tl.load(by_softmax + row)
    block = tl.arange(0, BLOCK)
    tile = tl.arange(0, BLOCK // 2) if PAIRS else block
    raws = ()  # type: tuple
    t_raws = ()  # type: tuple
    for i in tl.static_range(BLOCKS):  # all on their way at once
        raws += (load_ahead(logits, begin + i * BLOCK, tile, None, end, PAIRS),)
        t_raws += (load_ahead(teacher, begin + i * BLOCK, tile, None, end, PAIRS),)
    student_kls = tl.zeros([BLOCK], dtype)
    teacher_kls = tl.zeros([BLOCK], dtype)
    held = ()  # type: tuple
    for i in tl.static_range(BLOCKS):
        columns = begin + i * BLOCK + block
        z = to_logits(widened(raws[i], PAIRS), dtype, columns, end, TRANSFORM)
        v = widened(t_raws[i], PAIRS)
        v = to_logits(v, dtype, columns, end, TEACHER_TRANSFORM)
        bits = counted(_bits(z, at, by, FAST))
        t_bits = counted(_bits(v, t_at, t_by, FAST) + (t_by if FAST else 0.0))
        p, q, m_by_p, q_by_m = to_mixture(bits, t_bits, BETA, FAST)
        student_kls -= p * m_by_p
        teacher_kls += q * q_by_m
        held += (m_by_p,)
    student_kl = tl.sum(student_kls, axis=0) * inverse
    if words is not None:
        words += row * num_parts
        leave(words, STUDENT_KL, num_parts, part, number_word(student_kl))
    if by_softmax is not None:
        # The columns that were read last are in the nearest cache.
        raw = load_ahead(logits, begin + (BLOCKS - 1) * BLOCK, tile, None, end, PAIRS)
    shares += part.to(tl.int64) * num_rows + row
    tl.store(shares, student_kl * LN_2)
    shares += num_rows * num_parts
    tl.store(shares, tl.sum(teacher_kls, axis=0) * inverse * LN_2)

    if by_softmax is not None:
        if words is not None:
            parts = numbers_left(words, STUDENT_KL, num_parts, MOST_PARTS)
            student_kl = tl.sum(parts, axis=0)
        c_softmax += c_mixture * student_kl
        if FAST:
            c_softmax += c_log_softmax * tl.log2(inverse)
            c_softmax, c_mixture = c_softmax * inverse, c_mixture * inverse
            c_log_softmax *= inverse
        for i in tl.static_range(BLOCKS):
            first = begin + (BLOCKS - 1 - i) * BLOCK
            columns = first + block
            this = widened(raw, PAIRS)
            if i < BLOCKS - 1:
                raw = load_ahead(logits, first - BLOCK, tile, None, end, PAIRS)
            z = to_logits(this, dtype, columns, end, TRANSFORM)
            bits = _bits(z, at, by, FAST)
            factor = c_softmax + c_mixture * held[BLOCKS - 1 - i]
            if by_log_softmax is not None:
                factor += c_log_softmax * counted(bits)
            grad = tl.exp2(bits) * factor + c_constant
            if (column >= first) & (column < first + BLOCK):
                grad += tl.where(columns == column, c_label, 0.0)
            store_gradient(logits, columns, end, grad, this, TRANSFORM)


@triton.jit
def _bits(z, at, by, FAST: tl.constexpr):
    """log2 of a softmax, if FAST without its normalizer."""
    return bits_above(at, z) if FAST else log2_of(z, at, by)
