"""The Triton kernels behind `triton_sweeps.py`; the only file that imports triton.

One program per row reads the logits once for the statistics; the gradient's programs are
independent of each other. What is None, or has no place, is compiled away, so what no term
asks for costs nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _logits(
    pointer, columns, num_columns, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr
):
    """Logits z of these columns; -inf beyond the last one."""
    inside = columns < num_columns
    z = tl.load(pointer + columns, mask=inside, other=-float("inf"))
    if z.dtype != tl.float64:
        z = z.to(tl.float32)
    z = _transformed(z, SOFTCAP, TEMPERATURE)
    if SOFTCAP > 0:  # tanh has made -inf finite
        z = tl.where(inside, z, -float("inf"))
    return z


@triton.jit
def _transformed(z, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    if SOFTCAP > 0:
        z = _tanh(z / SOFTCAP) * (SOFTCAP / TEMPERATURE)
    elif TEMPERATURE != 1:
        z = z / TEMPERATURE
    return z


@triton.jit
def _tanh(x):
    exp = tl.exp(-2 * tl.abs(x))
    tanh = (1 - exp) / (1 + exp)
    return tl.where(x < 0, -tanh, tanh)


@triton.jit
def _finite(maximum):
    """-inf - -inf would be NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _product(weights, values):
    """A column of -inf has no share."""
    return weights * tl.where(weights > 0, values, 0.0)


@triton.jit
def _moved(total, by, times, rescale):
    """sum w_j (x_j - old origin) -> sum w_j (x_j - new origin), for each lane."""
    return rescale * (total + times * tl.where(times > 0, by, 0.0))


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
    AT_student_by_teacher: tl.constexpr,
    AT_teacher_by_student: tl.constexpr,
    AT_candidate_logits: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    sums += row
    dtype: tl.constexpr = sums.dtype.element_ty
    lanes = tl.arange(0, BLOCK)

    # Maximum and sums are each lane's until the end: threads have nothing to exchange. A
    # lane's origin moves once in UNROLL blocks, which are read twice, then from the cache.
    zeros = tl.zeros([BLOCK], dtype)
    maximum = zeros - float("inf")
    sumexp = zeros
    logit_sum = zeros
    shifted_sum = zeros
    square_sum = zeros
    if AT_teacher_max >= 0:
        teacher += row * teacher_stride
        t_maximum = maximum
        t_sumexp = zeros
        t_shifted_sum = zeros
        student_by_teacher = zeros
        teacher_by_student = zeros

    for start in range(0, num_columns, BLOCK * UNROLL):
        new = maximum
        for i in tl.static_range(UNROLL):
            columns = start + i * BLOCK + lanes
            z = _logits(logits, columns, num_columns, SOFTCAP, TEMPERATURE)
            new = tl.maximum(new, z)
        origin = _finite(new)
        shift = maximum - origin
        rescale = tl.exp(shift)
        maximum = new
        if AT_teacher_max >= 0:
            t_new = t_maximum
            for i in tl.static_range(UNROLL):
                columns = start + i * BLOCK + lanes
                v = _logits(
                    teacher, columns, num_columns, TEACHER_SOFTCAP, TEACHER_TEMPERATURE
                )
                t_new = tl.maximum(t_new, v)
            t_origin = _finite(t_new)
            t_shift = t_maximum - t_origin
            t_rescale = tl.exp(t_shift)
            t_maximum = t_new
            if AT_teacher_by_student >= 0:
                teacher_by_student = _moved(
                    teacher_by_student, t_shift, sumexp, rescale
                )
            if AT_student_by_teacher >= 0:
                student_by_teacher = _moved(
                    student_by_teacher, shift, t_sumexp, t_rescale
                )
            if AT_teacher_shifted_sum >= 0:
                t_shifted_sum = _moved(t_shifted_sum, t_shift, t_sumexp, t_rescale)
            t_sumexp *= t_rescale
        if AT_shifted_sum >= 0:
            shifted_sum = _moved(shifted_sum, shift, sumexp, rescale)
        if AT_square_sum >= 0:
            square_sum *= rescale * rescale
        sumexp *= rescale

        for i in tl.static_range(UNROLL):
            columns = start + i * BLOCK + lanes
            z = _logits(logits, columns, num_columns, SOFTCAP, TEMPERATURE)
            shifted = z - origin
            exp = tl.exp(shifted)
            sumexp += exp
            if AT_shifted_sum >= 0:
                shifted_sum += _product(exp, shifted)
            if AT_square_sum >= 0:
                square_sum += exp * exp
            if AT_logit_sum >= 0:
                logit_sum += tl.where(columns < num_columns, z, 0.0)
            if AT_teacher_max >= 0:
                v = _logits(
                    teacher, columns, num_columns, TEACHER_SOFTCAP, TEACHER_TEMPERATURE
                )
                t_shifted = v - t_origin
                t_exp = tl.exp(t_shifted)
                t_sumexp += t_exp
                if AT_teacher_by_student >= 0:
                    teacher_by_student += _product(exp, t_shifted)
                if AT_student_by_teacher >= 0:
                    student_by_teacher += _product(t_exp, shifted)
                if AT_teacher_shifted_sum >= 0:
                    t_shifted_sum += _product(t_exp, t_shifted)

    total_max = tl.max(maximum, axis=0)
    shift = maximum - _finite(total_max)
    share = tl.exp(shift)
    tl.store(sums + AT_max * num_rows, total_max)
    tl.store(sums + AT_sumexp * num_rows, tl.sum(sumexp * share, axis=0))
    if AT_logit_sum >= 0:
        tl.store(sums + AT_logit_sum * num_rows, tl.sum(logit_sum, axis=0))
    if AT_shifted_sum >= 0:
        moved = _moved(shifted_sum, shift, sumexp, share)
        tl.store(sums + AT_shifted_sum * num_rows, tl.sum(moved, axis=0))
    if AT_square_sum >= 0:
        moved = square_sum * share * share
        tl.store(sums + AT_square_sum * num_rows, tl.sum(moved, axis=0))
    if AT_teacher_max >= 0:
        t_total_max = tl.max(t_maximum, axis=0)
        t_shift = t_maximum - _finite(t_total_max)
        t_share = tl.exp(t_shift)
        tl.store(sums + AT_teacher_max * num_rows, t_total_max)
        moved = t_sumexp * t_share
        tl.store(sums + AT_teacher_sumexp * num_rows, tl.sum(moved, axis=0))
        if AT_teacher_shifted_sum >= 0:
            moved = _moved(t_shifted_sum, t_shift, t_sumexp, t_share)
            tl.store(sums + AT_teacher_shifted_sum * num_rows, tl.sum(moved, axis=0))
        if AT_student_by_teacher >= 0:
            moved = _moved(student_by_teacher, shift, t_sumexp, t_share)
            tl.store(sums + AT_student_by_teacher * num_rows, tl.sum(moved, axis=0))
        if AT_teacher_by_student >= 0:
            moved = _moved(teacher_by_student, t_shift, sumexp, share)
            tl.store(sums + AT_teacher_by_student * num_rows, tl.sum(moved, axis=0))
    label = tl.load(label_columns + row)
    tl.store(
        sums + AT_label_logit * num_rows,
        _one_logit(logits, label, dtype, SOFTCAP, TEMPERATURE),
    )
    for k in tl.static_range(NUM_CANDIDATES):
        column = tl.load(candidates + row * NUM_CANDIDATES + k)
        tl.store(
            sums + (AT_candidate_logits + k) * num_rows,
            _one_logit(logits, column, dtype, SOFTCAP, TEMPERATURE),
        )


@triton.jit
def _one_logit(
    pointer,
    column,
    dtype: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """z of one column; 0 where the column is -1."""
    u = tl.load(pointer + column, mask=column >= 0, other=0.0)
    return _transformed(u.to(dtype), SOFTCAP, TEMPERATURE)


@triton.jit
def _log_mixture(log_p, log_q, LOG_STUDENT: tl.constexpr, LOG_TEACHER: tl.constexpr):
    a = log_p + LOG_STUDENT
    b = log_q + LOG_TEACHER
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    return high + tl.log(1 + tl.exp(low - _finite(high)))


@triton.jit
def mixture_kernel(
    logits,
    stride,
    num_columns,
    teacher,
    teacher_stride,
    maxima,
    sumexps,
    teacher_maxima,
    teacher_sumexps,
    shares,
    num_rows,
    LOG_STUDENT: tl.constexpr,
    LOG_TEACHER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    teacher += row * teacher_stride
    dtype: tl.constexpr = shares.dtype.element_ty
    origin = _finite(tl.load(maxima + row))
    log_sumexp = tl.log(tl.load(sumexps + row))
    t_origin = _finite(tl.load(teacher_maxima + row))
    t_log_sumexp = tl.log(tl.load(teacher_sumexps + row))
    student_kl = tl.zeros([BLOCK], dtype)
    teacher_kl = tl.zeros([BLOCK], dtype)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _logits(logits, columns, num_columns, SOFTCAP, TEMPERATURE)
        v = _logits(teacher, columns, num_columns, TEACHER_SOFTCAP, TEACHER_TEMPERATURE)
        log_p = (z - origin) - log_sumexp
        log_q = (v - t_origin) - t_log_sumexp
        log_m = _log_mixture(log_p, log_q, LOG_STUDENT, LOG_TEACHER)
        student_kl += _product(tl.exp(log_p), log_p - log_m)
        teacher_kl += _product(tl.exp(log_q), log_q - log_m)
    tl.store(shares + row, tl.sum(student_kl, axis=0))
    tl.store(shares + num_rows + row, tl.sum(teacher_kl, axis=0))


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
    log_mixture,
    by_candidates,
    NUM_CANDIDATES: tl.constexpr,
    LOG_STUDENT: tl.constexpr,
    LOG_TEACHER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride
    z = _logits(logits, columns, num_columns, SOFTCAP, TEMPERATURE)
    sumexp = tl.load(sumexps + row)
    shifted = z - _finite(tl.load(maxima + row))
    p = tl.exp(shifted) * (1 / sumexp)
    factor = tl.load(softmax + row)
    if log_softmax is not None or log_mixture is not None:
        log_p = shifted - tl.log(sumexp)
    if log_softmax is not None:
        factor += tl.load(log_softmax + row) * log_p
    if square is not None:
        factor += tl.load(square + row) * p
    if teacher_maxima is not None:
        v = _logits(
            teacher + row * teacher_stride,
            columns,
            num_columns,
            TEACHER_SOFTCAP,
            TEACHER_TEMPERATURE,
        )
        t_sumexp = tl.load(teacher_sumexps + row)
        t_shifted = v - _finite(tl.load(teacher_maxima + row))
        if log_teacher is not None or log_mixture is not None:
            log_q = t_shifted - tl.log(t_sumexp)
        if log_teacher is not None:
            factor += tl.load(log_teacher + row) * log_q
        if log_mixture is not None:
            log_m = _log_mixture(log_p, log_q, LOG_STUDENT, LOG_TEACHER)
            factor += tl.load(log_mixture + row) * log_m
    grad = _product(p, factor)
    if by_teacher is not None:
        grad += tl.load(by_teacher + row) * (tl.exp(t_shifted) * (1 / t_sumexp))
    if constant is not None:
        grad += tl.load(constant + row)
    # Before any rounding: for a confident token this nearly cancels the softmax's share.
    grad += tl.where(columns == tl.load(label_columns + row), tl.load(label + row), 0.0)
    for k in tl.static_range(NUM_CANDIDATES):
        place = row * NUM_CANDIDATES + k
        here = columns == tl.load(candidates + place)
        grad += tl.where(here, tl.load(by_candidates + place), 0.0)
    if SOFTCAP > 0:  # d tanh
        capped = z * (TEMPERATURE / SOFTCAP)
        grad *= 1 - capped * capped
    if TEMPERATURE != 1:
        grad /= TEMPERATURE
    tl.store(
        logits + columns,
        grad.to(logits.dtype.element_ty),
        mask=columns < num_columns,
    )


@triton.jit
def scale_kernel(grad, factor, out, numel, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if not (IN_PLACE and by == 1):
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < numel
        x = tl.load(grad + places, mask=inside).to(by.dtype) * by
        tl.store(out + places, x.to(out.dtype.element_ty), mask=inside)
