"""Triton kernels that leave gradients where the logits were.

The programs of `gradient_kernel` are independent of each other. Where a row's gradient
needs nothing but the row, `both_kernel` computes the sums as well, in one trip to memory.
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
    load_logit,
    load_logits,
    load_optional,
    load_raw,
    log2_of,
    origin_of,
    product,
    rescaled,
    store_gradient,
    sum_of,
    threads_tile,
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
    groups,
    NUM_CANDIDATES: tl.constexpr,
    BETA: tl.constexpr,
    FAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_TEMPERATURE: tl.constexpr,
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
    by_mixture = load_optional(mixture, row) * LN_2
    label_column = tl.load(label_columns + row)
    by_label = tl.load(label + row)

    start = program % groups * (BLOCK * BLOCKS)
    for first in range(start, tl.minimum(start + BLOCK * BLOCKS, num_columns), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        raw = load_raw(logits, columns, num_columns)
        z = to_logits(raw, dtype, columns, num_columns, SOFTCAP, TEMPERATURE)
        p = tl.exp2(bits_above(origin, z)) * inverse
        factor = by_softmax
        if log_softmax is not None:
            factor += by_log_softmax * ((z - maximum) - tl.log(sumexp))
        if square is not None:
            factor += by_square * p
        if teacher_maxima is not None:
            v = load_logits(
                teacher,
                dtype,
                columns,
                num_columns,
                TEACHER_SOFTCAP,
                TEACHER_TEMPERATURE,
            )
            q = tl.exp2(bits_above(t_origin, v)) * t_inverse
            log_q = (v - t_maximum) - tl.log(t_sumexp)
            if log_teacher is not None:
                factor += by_log_teacher * log_q
            if mixture is not None:
                _p, _q, m_by_p, _q_by_m = to_mixture(
                    log2_of(z, maximum, sumexp),
                    log2_of(v, t_maximum, t_sumexp),
                    BETA,
                    FAST,
                )
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
        store_gradient(logits, columns, num_columns, grad, raw, SOFTCAP, TEMPERATURE)


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
    logit_sums,
    words,
    num_parts,
    part_columns,
    MOST_PARTS: tl.constexpr,
    AT_max: tl.constexpr,
    AT_sumexp: tl.constexpr,
    AT_label_logit: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    GRADIENT_BLOCK: tl.constexpr,
):
    """Sums and gradient of what is in `statistics.AT_ONCE`.

    A row's parts are programs that run side by side, so that a part is in the nearest cache
    when it is read again: each leaves its maximum and sum in a word and waits for the
    others' words. A GPU starts programs in their order, and finishes those that do not
    wait: the parts of a row need no more than room for as many programs.
    """
    program = tl.program_id(0)
    row = (program // num_parts).to(tl.int64)
    part = program % num_parts
    logits += row * stride
    sums += row
    begin = part * part_columns
    end = tl.minimum(begin + part_columns, num_columns)
    dtype: tl.constexpr = sums.dtype.element_ty

    column = tl.load(label_columns + row).to(tl.int32)
    by_softmax = tl.load(softmax + row)
    by_label = tl.load(label + row)
    maximum, origin, sumexp, logit_sum = _threads_sums(
        logits, begin, end, dtype, SOFTCAP, TEMPERATURE, BLOCK, UNROLL, VECTOR
    )
    part_max = tl.max(maximum, axis=0)
    base = finite(origin_of(part_max))
    total_sumexp = _sum_above(sumexp, origin, base)
    here = (column >= begin) & (column < end)
    label_raw, label_logit = load_logit(
        logits, tl.where(here, column, -1), dtype, SOFTCAP, TEMPERATURE
    )
    tl.debug_barrier()  # all threads have read what is overwritten below
    total_max = part_max
    if words is not None:
        words += row * num_parts
        tl.atomic_xchg(words + part, _packed(part_max, total_sumexp), sem="relaxed")
    if logit_sums is not None:
        logit_sum = tl.sum(logit_sum, axis=0)
        tl.store(logit_sums + part * num_rows + row, logit_sum)
    if here | ((part == 0) & (column < 0)):
        tl.store(sums + AT_label_logit * num_rows, label_logit)
    # The columns that were read last are in the nearest cache.
    num_blocks = tl.cdiv(end - begin, GRADIENT_BLOCK)
    block = tl.arange(0, GRADIENT_BLOCK)
    raw = load_raw(logits, begin + (num_blocks - 1) * GRADIENT_BLOCK + block, end)
    if words is not None:
        parts = tl.arange(0, MOST_PARTS)
        theirs = tl.load(words + parts, parts < num_parts, other=-1, volatile=True)
        while tl.min((theirs != 0).to(tl.int32), axis=0) == 0:
            theirs = tl.load(words + parts, parts < num_parts, other=-1, volatile=True)
        maxima, sumexps = _unpacked(theirs)
        maxima = tl.where(parts < num_parts, maxima, -float("inf"))
        sumexps = tl.where(parts < num_parts, sumexps, 0.0)
        total_max = tl.max(maxima, axis=0)
        base = finite(origin_of(total_max))
        total_sumexp = _sum_above(sumexps, origin_of(maxima), base)
    if part == 0:
        _, to_max = bits_to(base, finite(total_max))
        tl.store(sums + AT_max * num_rows, total_max)
        above_max = at_least_one(total_sumexp * to_max, total_max)
        tl.store(sums + AT_sumexp * num_rows, above_max)

    factor = by_softmax / total_sumexp
    by_constant = load_optional(constant, row)
    for i in range(0, num_blocks):
        columns = begin + (num_blocks - 1 - i) * GRADIENT_BLOCK + block
        this, before = raw, columns - GRADIENT_BLOCK
        z = to_logits(this, dtype, columns, end, SOFTCAP, TEMPERATURE)
        raw = tl.load(logits + before, mask=before >= begin, other=0.0)
        grad = tl.exp2(bits_above(base, z)) * factor + by_constant
        store_gradient(logits, columns, end, grad, this, SOFTCAP, TEMPERATURE)
    if here:
        tl.debug_barrier()  # the label's comes last
        by_one = (
            tl.exp2(bits_above(base, label_logit)) * factor + by_constant + by_label
        )
        store_gradient(logits, column, end, by_one, label_raw, SOFTCAP, TEMPERATURE)


@triton.jit
def _threads_sums(
    logits,
    begin,
    end,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Each thread's maximum, origin, sum of exponentials above it, and sum of logits."""
    tile = threads_tile(BLOCK, UNROLL, VECTOR)
    sumexp = tl.zeros([BLOCK // VECTOR], dtype)
    logit_sum = sumexp
    maximum = sumexp - float("inf")
    origin = maximum
    raw = load_raw(logits, begin + tile, end)
    for start in range(begin, end, BLOCK * UNROLL):
        columns = start + tile
        z = to_logits(raw, dtype, columns, end, SOFTCAP, TEMPERATURE)
        # on its way while others compute
        raw = load_raw(logits, columns + BLOCK * UNROLL, end)
        logit_sum += sum_of(tl.where(columns < end, z, 0.0))
        maximum, origin, base, shift = followed(maximum, origin, z)
        exp = tl.exp2(bits_above(base[:, None, None], z))
        sumexp = rescaled(sumexp, tl.exp2(shift)) + sum_of(exp)
    return maximum, origin, sumexp, logit_sum


@triton.jit
def _sum_above(sumexps, origins, base):
    """The sum of exponentials above one origin; of -inf, which nothing has, no share."""
    return tl.sum(rescaled(sumexps, tl.exp2(origins - base)), axis=0)


@triton.jit
def _packed(maximum, sumexp):
    """Two float32 in a word that is never zero: the sum is zero only beside -inf."""
    high = maximum.to(tl.int32, bitcast=True).to(tl.int64) << 32
    low = sumexp.to(tl.int32, bitcast=True).to(tl.int64)
    return high | (low & 0x7FFFFFFF)  # the sum has no sign, unless it is NaN


@triton.jit
def _unpacked(word):
    maximum = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return maximum, word.to(tl.int32).to(tl.float32, bitcast=True)


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
