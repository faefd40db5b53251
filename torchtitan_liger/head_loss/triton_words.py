"""Triton: the words in memory by which a row's parts, programs side by side, add up.

Each part leaves its own, and waits for those of the others. A GPU starts programs in their
order, and finishes those that do not wait: the parts of a row need no more than room for
as many programs.
"""

import triton
import triton.language as tl


@triton.jit
def sum_word(maximum, sumexp):
    """Two float32 in a word that is never zero: the sum is zero only beside -inf."""
    high = maximum.to(tl.int32, bitcast=True).to(tl.int64) << 32
    low = sumexp.to(tl.int32, bitcast=True).to(tl.int64)
    return high | (low & 0x7FFFFFFF)  # the sum has no sign, unless it is NaN


@triton.jit
def number_word(number):
    """A float32 in a word that is never zero."""
    return (number.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (1 << 32)


@triton.jit
def leave(words, KIND: tl.constexpr, num_parts, part, word):
    tl.atomic_xchg(words + KIND * num_parts + part, word, sem="relaxed")


@triton.jit
def sums_left(words, KIND: tl.constexpr, num_parts, MOST_PARTS: tl.constexpr):
    """All parts' maxima and sums of exponentials."""
    # Beyond the last part the bits of -inf, and of 0.
    word = _when_there(words, KIND, num_parts, -0x0080_0000 << 32, MOST_PARTS)
    maxima = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return maxima, word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def numbers_left(words, KIND: tl.constexpr, num_parts, MOST_PARTS: tl.constexpr):
    word = _when_there(words, KIND, num_parts, 1 << 32, MOST_PARTS)
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _when_there(
    words,
    KIND: tl.constexpr,
    num_parts,
    BEYOND: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    """All parts' words of one kind, of which none is zero once it has been left."""
    parts = tl.arange(0, MOST_PARTS)
    words += KIND * num_parts
    word = tl.load(words + parts, parts < num_parts, other=BEYOND, volatile=True)
    while tl.min((word != 0).to(tl.int32), axis=0) == 0:
        word = tl.load(words + parts, parts < num_parts, other=BEYOND, volatile=True)
    return word
