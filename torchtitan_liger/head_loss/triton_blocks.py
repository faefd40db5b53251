"""What the Triton kernels share: a block of logits, from memory to memory.

What is None, or has no place, is compiled away.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TWO_OF_NOTHING = tl.constexpr(-0x7F0080)  # the bits of -inf, twice


@triton.jit
def threads_tile(BLOCK: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr):
    """[threads, UNROLL, VECTOR] columns: a thread's come in vectors, BLOCK apart."""
    threads = tl.arange(0, BLOCK // VECTOR)[:, None, None]
    block = tl.arange(0, UNROLL)[None, :, None]
    return threads * VECTOR + block * BLOCK + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def largest(z):
    """Of each thread's part of a tile."""
    return tl.max(tl.max(z, axis=2), axis=1)


@triton.jit
def sum_of(z):
    """Of each thread's part of a tile."""
    return tl.sum(tl.sum(z, axis=2), axis=1)


@triton.jit
def load_raw(pointer, columns, num_columns):
    """What the memory has of these columns; -inf beyond the last one."""
    return tl.load(pointer + columns, mask=columns < num_columns, other=-float("inf"))


@triton.jit
def load_ahead(pointer, start, tile, begin, end, PAIRS: tl.constexpr):
    """What the memory has of a tile from `start` on; -inf before `begin`, or from `end` on:
    one of them is None, where no tile comes.

    If PAIRS, a tile of words with two bfloat16 each, which `widened` takes: in half the
    registers, and by half the instructions.
    """
    if PAIRS:
        pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
        # Shifts, of which the compiler knows what is left of a divisor of 16.
        start, begin = start >> 1, None if begin is None else begin >> 1
        end = None if end is None else end >> 1
    places = start + tile
    inside = places < end if begin is None else places >= begin
    other: tl.constexpr = TWO_OF_NOTHING if PAIRS else -float("inf")
    return tl.load(pointer + places, mask=inside, other=other)


@triton.jit
def widened(raw, PAIRS: tl.constexpr):
    """A tile of numbers from `load_ahead`."""
    if PAIRS:
        first = (raw << 16).to(tl.float32, bitcast=True)
        second = (raw & -0x10000).to(tl.float32, bitcast=True)
        raw = tl.interleave(first, second)
    return raw


@triton.jit
def to_logits(
    raw,
    dtype: tl.constexpr,
    columns,
    num_columns,
    TRANSFORM: tl.constexpr,
):
    """Logits z of what `load_raw` got, in the dtype of the sums."""
    z = transformed(raw.to(dtype), TRANSFORM)
    if TRANSFORM[0] > 0:  # tanh has made -inf finite
        z = tl.where(columns < num_columns, z, -float("inf"))
    return z


@triton.jit
def load_logits(
    pointer,
    dtype: tl.constexpr,
    columns,
    num_columns,
    TRANSFORM: tl.constexpr,
):
    """Logits z of these columns; -inf beyond the last one."""
    raw = load_raw(pointer, columns, num_columns)
    return to_logits(raw, dtype, columns, num_columns, TRANSFORM)


@triton.jit
def transformed(z, TRANSFORM: tl.constexpr):
    """By a `sweeps.Transform`."""
    SOFTCAP: tl.constexpr = TRANSFORM[0]
    TEMPERATURE: tl.constexpr = TRANSFORM[1]
    if SOFTCAP > 0:
        z = tanh(z / SOFTCAP) * (SOFTCAP / TEMPERATURE)
    elif TEMPERATURE != 1:
        z = z / TEMPERATURE
    return z


@triton.jit
def tanh(x):
    exp = tl.exp(-2 * tl.abs(x))
    tanh = (1 - exp) / (1 + exp)
    tanh = tl.where(x < 0, -tanh, tanh)
    if x.dtype == tl.float32:  # where the difference would lose digits: Taylor, to 1e-8
        s = x * x
        series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
        tanh = tl.where(tl.abs(x) < 0.25, x * series, tanh)
    return tanh


@triton.jit
def load_logit(
    pointer,
    column,
    dtype: tl.constexpr,
    TRANSFORM: tl.constexpr,
):
    """What the memory has of one column, and its z; 0 where the column is -1."""
    raw = tl.load(pointer + column, mask=column >= 0, other=0.0)
    return raw, transformed(raw.to(dtype), TRANSFORM)


@triton.jit
def finite(maximum):
    """-inf - -inf would be NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def origin_of(maximum):
    """Exponents are counted from a whole number of bits, not below the maximum: sums move
    from one such origin to another without rounding."""
    return tl.ceil(maximum * LOG2_E)


@triton.jit
def followed(maximum, origin, z):
    """Each thread's maximum and origin with a tile z more; the origin once more, but
    finite, and how far it is below the old one, in bits."""
    maximum = tl.maximum(maximum, largest(z))
    new = origin_of(maximum)
    base = finite(new)
    return maximum, new, base, origin - base


@triton.jit
def bits_above(origin, z):
    """The exponent of `exp z` above an origin, rounded once."""
    # A plain constant would be rounded to float32.
    log2_e = tl.full((), LOG2_E, origin.dtype)
    return tl.fma(z.to(origin.dtype), log2_e, -origin)


@triton.jit
def bits_to(origin, maximum):
    """How far an origin lies above a maximum, in bits, and two to the power of that.

    Once a row, so it can be exact: a GPU's float32 exponential is off by a few roundings,
    but not at whole numbers. The constant is that of `bits_above`.
    """
    log2_e = tl.full((), LOG2_E, maximum.dtype)
    wide, log2_e = maximum.to(tl.float64), log2_e.to(tl.float64)
    bits = -tl.fma(wide, log2_e, -origin.to(tl.float64))
    return bits.to(maximum.dtype), tl.exp2(bits).to(maximum.dtype)


@triton.jit
def around_one(maximum, sumexp):
    """An origin above which a row's exponentials add up to about 1, and 1 / that sum."""
    origin = tl.floor(maximum * LOG2_E + tl.log2(sumexp))
    _, to_max = bits_to(origin, maximum)
    return origin, to_max / sumexp


@triton.jit
def at_least_one(sumexp, maximum):
    """A sum of exponentials above their maximum: its own is 1, whatever was rounded."""
    return tl.where((sumexp < 1) & (maximum > -float("inf")), 1.0, sumexp)


@triton.jit
def rescaled(sumexp, factor):
    """A sum of exponentials above another origin.

    An origin so low that it has no digits behind the point, as that of masked columns, may
    have left an infinite sum: it counts for nothing beside what is far above.
    """
    lost = (factor == 0) & (sumexp == float("inf"))
    return tl.where(lost, 0.0, sumexp * factor)


@triton.jit
def moved_sum(total, bits, times, rescale):
    """sum w_j (x_j - old origin) -> sum w_j (x_j - new origin), `bits` lower, of several
    parts whose weights add up to `times` and are rescaled."""
    moved = total + times * tl.where(times > 0, bits, 0.0)
    # What is too small to count has no share, and were it infinite.
    return tl.where(rescale == 0, 0.0, rescale * moved)


@triton.jit
def product(weights, values):
    """A column of -inf has no share."""
    return weights * tl.where(weights > 0, values, 0.0)


@triton.jit
def product_of_bits(exp, bits):
    """`product(exp2(bits), bits)`, in fewer instructions."""
    return exp * tl.maximum(bits, -1e30)


@triton.jit
def log2_of(z, maximum, sumexp):
    """log2 of a softmax."""
    log2_e = tl.full((), LOG2_E, maximum.dtype)
    return tl.fma(z - maximum, log2_e, -tl.log(sumexp) * log2_e)


@triton.jit
def counted(bits):
    """What is below -120, as -inf is, counts for nothing."""
    return tl.maximum(bits, -120.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_mixture(bits_p, bits_q, BETA: tl.constexpr, FAST: tl.constexpr):
    """p, q, log2(m / p) and log2(q / m) of `m = BETA q + (1 - BETA) p`, from `counted`
    logarithms of both.

    Exact also where m is nearly p or q. If FAST, in half the instructions: the logarithms
    to 6e-7 where they are small, and to 4e-7 of them elsewhere. If both lack a logarithm, it
    is a factor that p and q lack, and the other two are what they are.
    """
    p, gap = tl.exp2(bits_p), bits_q - bits_p
    q_by_p = tl.exp2(gap)
    if FAST:
        log_m = libdevice.fast_log2f(BETA * q_by_p + (1 - BETA))
        return p, p * q_by_p, log_m, gap - log_m
    # Of the smaller and the larger one; neither may be what the other leaves of 1.
    of_p, of_q = tl.full((), 1 - BETA, gap.dtype), tl.full((), BETA, gap.dtype)
    small, large = tl.where(gap > 0, of_p, of_q), tl.where(gap > 0, of_q, of_p)
    size = tl.abs(gap) * tl.full((), LN_2, gap.dtype)
    lost = small * _expm1_of_negative(size)
    log_m = tl.where(lost > -0.5, _log1p(lost), tl.log(large + small * tl.exp(-size)))
    log_m *= tl.full((), LOG2_E, gap.dtype)
    return (
        p,
        p * q_by_p,
        tl.maximum(gap, 0.0) + log_m,
        tl.minimum(gap, 0.0) - log_m,
    )


@triton.jit
def _expm1_of_negative(x):
    """exp(-x) - 1 for x >= 0."""
    series = -x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5))))
    return tl.where(x < 0.01, series, tl.exp(-x) - 1)


@triton.jit
def _log1p(x):
    """For -1 < x <= 0: what the sum loses of x is small beside a sum that loses any."""
    sum = 1 + x
    return tl.log(sum) + (x - (sum - 1))


@triton.jit
def load_optional(pointer, row):
    """A row's number; 0 where there are none."""
    value = 0.0
    if pointer is not None:
        value = tl.load(pointer + row)
    return value


@triton.jit
def store_gradient(
    logits,
    columns,
    num_columns,
    grad,
    raw,
    TRANSFORM: tl.constexpr,
):
    """The gradient by the raw logits, in their place."""
    SOFTCAP: tl.constexpr = TRANSFORM[0]
    TEMPERATURE: tl.constexpr = TRANSFORM[1]
    if SOFTCAP > 0:  # d tanh; near the cap nothing is left of 1 - tanh ** 2
        exp = tl.exp(-2 * tl.abs(raw.to(grad.dtype) / SOFTCAP))
        grad *= 4 * exp / ((1 + exp) * (1 + exp))
    if TEMPERATURE != 1:
        grad /= TEMPERATURE
    tl.store(
        logits + columns,
        grad.to(logits.dtype.element_ty),
        mask=columns < num_columns,
        cache_modifier=".cs",  # who reads it next comes after all other rows
    )
