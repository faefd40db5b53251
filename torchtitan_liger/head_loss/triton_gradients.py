"""Triton kernels that leave gradients where the logits were.

The programs of `gradient_kernel` are independent of each other. Where a row's gradient
needs nothing but the row, `both_kernel` computes the sums as well, and reads the logits
for the gradient from the cache.
"""

import triton
import triton.language as tl

from torchtitan_liger.head_loss.triton_blocks import (
    bits_above,
    bits_to,
    finite,
    load_logit,
    load_logits,
    load_optional,
    origin_of,
    product,
    store_gradient,
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
    softmax,
    label,
    log_softmax,
    square,
    constant,
    teacher_maxima,
    teacher_sumexps,
    by_teacher,
    log_teacher,
    mixture,
    by_candidates,
    NUM_CANDIDATES: tl.constexpr,
    BETA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    maximum = finite(tl.load(maxima + row))
    origin = origin_of(maximum)
    _, to_max = bits_to(origin, maximum)
    sumexp = tl.load(sumexps + row)
    inverse = to_max / sumexp
    by_softmax = tl.load(softmax + row)
    by_log_softmax = load_optional(log_softmax, row)
    by_square = load_optional(square, row)
    by_constant = load_optional(constant, row)
    if teacher_maxima is not None:
        teacher += row * teacher_stride
        t_maximum = finite(tl.load(teacher_maxima + row))
        t_origin = origin_of(t_maximum)
        _, to_max = bits_to(t_origin, t_maximum)
        t_sumexp = tl.load(teacher_sumexps + row)
        t_inverse = to_max / t_sumexp
    by_t_softmax = load_optional(by_teacher, row)
    by_log_teacher = load_optional(log_teacher, row)
    by_mixture = load_optional(mixture, row)
    label_column = tl.load(label_columns + row)
    by_label = tl.load(label + row)

    start = tl.program_id(1) * (BLOCK * BLOCKS)
    for first in range(start, tl.minimum(start + BLOCK * BLOCKS, num_columns), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = load_logits(logits, columns, num_columns, SOFTCAP, TEMPERATURE)
        p = tl.exp2(bits_above(origin, z)) * inverse
        factor = by_softmax
        if log_softmax is not None:
            factor += by_log_softmax * ((z - maximum) - tl.log(sumexp))
        if square is not None:
            factor += by_square * p
        if teacher_maxima is not None:
            v = load_logits(
                teacher, columns, num_columns, TEACHER_SOFTCAP, TEACHER_TEMPERATURE
            )
            q = tl.exp2(bits_above(t_origin, v)) * t_inverse
            log_q = (v - t_maximum) - tl.log(t_sumexp)
            if log_teacher is not None:
                factor += by_log_teacher * log_q
            if mixture is not None:
                log_p = (z - maximum) - tl.log(sumexp)
                m_by_p, _q_by_m = to_mixture(log_p, log_q, BETA)
                factor += by_mixture * m_by_p
        grad = product(p, factor)
        if by_teacher is not None:
            grad += by_t_softmax * q
        if constant is not None:
            grad += by_constant
        # Before any rounding: for a confident token this nearly cancels the softmax's share.
        # Few blocks have the column: the others should not look at each of theirs.
        if (label_column >= first) & (label_column < first + BLOCK):
            grad += tl.where(columns == label_column, by_label, 0.0)
        for k in tl.static_range(NUM_CANDIDATES):
            column = tl.load(candidates + row * NUM_CANDIDATES + k)
            if (column >= first) & (column < first + BLOCK):
                by_candidate = tl.load(by_candidates + row * NUM_CANDIDATES + k)
                grad += tl.where(columns == column, by_candidate, 0.0)
        store_gradient(logits, columns, num_columns, grad, z, SOFTCAP, TEMPERATURE)


@triton.jit
def both_kernel(
    logits,
    stride,
    num_columns,
    label_columns,
    sums,
    num_rows,
    softmax,
    label,
    constant,
    AT_max: tl.constexpr,
    AT_sumexp: tl.constexpr,
    AT_label_logit: tl.constexpr,
    AT_logit_sum: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    GRADIENT_BLOCK: tl.constexpr,
):
    """Sums and gradient of what is in `statistics.AT_ONCE`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    sums += row
    dtype: tl.constexpr = sums.dtype.element_ty
    column = tl.load(label_columns + row)
    label_logit = load_logit(logits, column, dtype, SOFTCAP, TEMPERATURE)
    tl.store(sums + AT_label_logit * num_rows, label_logit)

    zeros = tl.zeros([BLOCK], dtype)
    maximum = zeros - float("inf")
    origin = maximum
    sumexp = zeros
    logit_sum = zeros
    tile = tl.arange(0, UNROLL)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in range(0, num_columns, BLOCK * UNROLL):
        columns = start + tile
        z = load_logits(
            logits, columns, num_columns, SOFTCAP, TEMPERATURE, "evict_last"
        )
        maximum = tl.maximum(maximum, tl.max(z, axis=0))
        old = origin
        origin = origin_of(maximum)
        base = finite(origin)
        exp = tl.exp2(bits_above(base[None, :], z))
        sumexp = sumexp * tl.exp2(old - base) + tl.sum(exp, axis=0)
        if AT_logit_sum >= 0:
            logit_sum += tl.sum(tl.where(columns < num_columns, z, 0.0), axis=0)
    total_max = tl.max(maximum, axis=0)
    highest = finite(tl.max(origin, axis=0))
    total_sumexp = tl.sum(sumexp * tl.exp2(origin - highest), axis=0)
    _, to_max = bits_to(highest, finite(total_max))
    tl.store(sums + AT_max * num_rows, total_max)
    tl.store(sums + AT_sumexp * num_rows, total_sumexp * to_max)
    if AT_logit_sum >= 0:
        tl.store(sums + AT_logit_sum * num_rows, tl.sum(logit_sum, axis=0))

    tl.debug_barrier()  # all threads have read what is overwritten now
    factor = tl.load(softmax + row) / total_sumexp
    by_label = tl.load(label + row)
    num_blocks = tl.cdiv(num_columns, GRADIENT_BLOCK)
    for i in range(0, num_blocks):
        # The columns that were read last are in the nearest cache.
        first = (num_blocks - 1 - i) * GRADIENT_BLOCK
        columns = first + tl.arange(0, GRADIENT_BLOCK)
        z = load_logits(
            logits, columns, num_columns, SOFTCAP, TEMPERATURE, "evict_first"
        )
        grad = tl.exp2(bits_above(highest, z)) * factor
        if constant is not None:
            grad += tl.load(constant + row)
        if (column >= first) & (column < first + GRADIENT_BLOCK):
            grad += tl.where(columns == column, by_label, 0.0)
        store_gradient(logits, columns, num_columns, grad, z, SOFTCAP, TEMPERATURE)


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
