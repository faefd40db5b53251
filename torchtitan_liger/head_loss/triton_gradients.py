"""Triton kernels that leave gradients where the logits were, and one that scales them."""

import triton
import triton.language as tl

from torchtitan_liger.head_loss.triton_blocks import (
    LN_2,
    bits_above,
    bits_to,
    counted,
    finite,
    load_logits,
    load_optional,
    load_raw,
    log2_of,
    origin_of,
    product,
    store_gradient,
    to_logits,
    to_mixture,
)


@triton.jit
def gradient_kernel(
    logits,
    stride,
    num_columns,
    label_columns,
    candidates,
    teacher,
    teacher_stride,
    maxima,
    sumexps,
    by_softmax,
    by_label,
    by_log_softmax,
    by_square,
    by_constant,
    teacher_maxima,
    teacher_sumexps,
    by_teacher,
    by_log_teacher,
    by_mixture,
    by_candidates,
    groups,
    NUM_CANDIDATES: tl.constexpr,
    BETA: tl.constexpr,
    FAST: tl.constexpr,
    TRANSFORM: tl.constexpr,
    TEACHER_TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # Programs side by side are side by side in memory, and the first ones have the last
    # rows, which were read last and may be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // groups).to(tl.int64)
    logits += row * stride
    dtype: tl.constexpr = maxima.dtype.element_ty
    maximum = finite(tl.load(maxima + row))
    origin = origin_of(maximum)
    _, to_max = bits_to(origin, maximum)
    sumexp = tl.load(sumexps + row)
    inverse = to_max / sumexp
    c_softmax = tl.load(by_softmax + row)
    c_log_softmax = load_optional(by_log_softmax, row)
    c_square = load_optional(by_square, row)
    c_constant = load_optional(by_constant, row)
    if teacher_maxima is not None:
        teacher += row * teacher_stride
        t_maximum = finite(tl.load(teacher_maxima + row))
        t_origin = origin_of(t_maximum)
        _, to_max = bits_to(t_origin, t_maximum)
        t_sumexp = tl.load(teacher_sumexps + row)
        t_inverse = to_max / t_sumexp
    c_teacher = load_optional(by_teacher, row)
    c_log_teacher = load_optional(by_log_teacher, row)
    c_mixture = load_optional(by_mixture, row) * LN_2
    label_column = tl.load(label_columns + row)
    c_label = tl.load(by_label + row)

    start = program % groups * (BLOCK * BLOCKS)
    for first in range(start, tl.minimum(start + BLOCK * BLOCKS, num_columns), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        raw = load_raw(logits, columns, num_columns)
        z = to_logits(raw, dtype, columns, num_columns, TRANSFORM)
        p = tl.exp2(bits_above(origin, z)) * inverse
        factor = c_softmax
        if by_log_softmax is not None:
            factor += c_log_softmax * ((z - maximum) - tl.log(sumexp))
        if by_square is not None:
            factor += c_square * p
        if teacher_maxima is not None:
            v = load_logits(
                teacher,
                dtype,
                columns,
                num_columns,
                TEACHER_TRANSFORM,
            )
            q = tl.exp2(bits_above(t_origin, v)) * t_inverse
            log_q = (v - t_maximum) - tl.log(t_sumexp)
            if by_log_teacher is not None:
                factor += c_log_teacher * log_q
            if by_mixture is not None:
                _p, _q, m_by_p, _q_by_m = to_mixture(
                    counted(log2_of(z, maximum, sumexp)),
                    counted(log2_of(v, t_maximum, t_sumexp)),
                    BETA,
                    FAST,
                )
                factor += c_mixture * m_by_p
        grad = product(p, factor)
        if by_teacher is not None:
            grad += c_teacher * q
        if by_constant is not None:
            grad += c_constant
        # Before any rounding: for a confident token this nearly cancels the softmax's share.
        # Few blocks have the column: the others should not look at each of theirs.
        if (label_column >= first) & (label_column < first + BLOCK):
            grad += tl.where(columns == label_column, c_label, 0.0)
        for k in tl.static_range(NUM_CANDIDATES):
            column = tl.load(candidates + row * NUM_CANDIDATES + k)
            if (column >= first) & (column < first + BLOCK):
                c_candidate = tl.load(by_candidates + row * NUM_CANDIDATES + k)
                grad += tl.where(columns == column, c_candidate, 0.0)
        store_gradient(logits, columns, num_columns, grad, raw, TRANSFORM)


@triton.jit
def scale_kernel(
    grad,
    factor,
    out,
    numel,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    by = tl.load(factor)
    if not (IN_PLACE and by == 1):
        start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
        for i in range(0, BLOCKS):
            places = start + i * BLOCK + tl.arange(0, BLOCK)
            inside = places < numel
            x = tl.load(grad + places, mask=inside).to(by.dtype) * by
            tl.store(out + places, x.to(out.dtype.element_ty), mask=inside)
