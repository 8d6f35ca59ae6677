"""Random words, exponential, logarithm and Gumbel noise with the bits of the CPU sampler.

The words are Philox4x32-10 (Salmon et al., SC 2011) with the counters of `rust/kernels/src/sampler/philox.rs`, the
functions those of `rust/kernels/src/simd/exact.rs`: single additions and multiplications in a fixed order, so kernels
that call them must be compiled without fused multiply-add (`launch.EXACT`). It does not know what is sampled.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The least finite float32, below every finite score."""
LAST_TOKEN = tl.constexpr(2**31 - 1)

ROUNDER = tl.constexpr(12_582_912.0)
"""1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, ties to even."""
ROUNDER_LESS_BIAS = tl.constexpr(0x4B400000 - 127)
LOG2_E = tl.constexpr(1.4426950216293335)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
NEAR_ONE_BITS = tl.constexpr(0x3E95F61A)


@triton.jit
def exact_exp(x):
    """`e^x`, clamped to [-87.33, 88.02], within 2 units in the last place."""
    x = tl.minimum(tl.maximum(x, -87.33), 88.02)
    shifted = x * LOG2_E + ROUNDER
    whole = shifted - ROUNDER
    r = x - whole * LN2_HIGH
    r = r - whole * LN2_LOW
    p = r * 1.9875691e-4 + 1.3981999e-3
    p = p * r + 8.333452e-3
    p = p * r + 4.1665796e-2
    p = p * r + 1.6666665e-1
    p = p * r + 0.5
    p = p * r * r + r + 1.0
    biased = shifted.to(tl.int32, bitcast=True) - ROUNDER_LESS_BIAS
    return p * (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_and_mantissa(x):
    """The exponent, and the mantissa in [sqrt(1/2), sqrt(2)), of positive normal numbers."""
    shifted = x.to(tl.int32, bitcast=True) + (0x3F800000 - SQRT_HALF_BITS)
    mantissa = ((shifted & 0x007FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True)
    return (shifted >> 23) - 127, mantissa


@triton.jit
def ln_1p_scaled(f, exponent):
    """`ln(1 + f) + exponent * ln 2` for f in [sqrt(1/2) - 1, sqrt(2) - 1)."""
    power = exponent.to(tl.float32)
    p = f * 7.0376836e-2 + -1.151461e-1
    p = p * f + 1.16769987e-1
    p = p * f + -1.2420141e-1
    p = p * f + 1.4249323e-1
    p = p * f + -1.6668058e-1
    p = p * f + 0.20000714
    p = p * f + -2.4999994e-1
    p = p * f + 3.333333e-1
    square = f * f
    y = p * f * square
    y = y + power * LN2_LOW
    y = y - square * 0.5
    return f + y + power * LN2_HIGH


@triton.jit
def exact_ln(x):
    """Natural logarithm of positive normal numbers."""
    exponent, mantissa = exponent_and_mantissa(x)
    return ln_1p_scaled(mantissa - 1.0, exponent)


@triton.jit
def unit_interval(word):
    """`(word + 1/2) / 2^32`, rounded to float32; `word` is uint32."""
    high = (word >> 16).to(tl.int32).to(tl.float32)
    low = (word & 0xFFFF).to(tl.int32).to(tl.float32)
    return (high * 65536.0 + low + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(word):
    """A standard Gumbel variate `-ln(-ln(1 - v))` with `v = (word + 1/2) / 2^32`."""
    v = unit_interval(word)
    exponent, mantissa = exponent_and_mantissa(unit_interval(word ^ 0xFFFFFFFF))
    # Where the exponent is 0, `mantissa - 1` would have lost the low bits of v; -v has them all.
    near_one = v.to(tl.int32, bitcast=True) <= NEAR_ONE_BITS
    f = tl.where(near_one, 0.0 - v, mantissa - 1.0)
    variate = 0.0 - ln_1p_scaled(f, tl.where(near_one, 0, exponent))
    return 0.0 - exact_ln(variate)


@triton.jit
def random_words(seed_low, seed_high, choice, position, counters):
    """Four uint32 for each counter: the words of the ids `64 * (counter // 16) + 16 * word + counter % 16`.

    The purpose, the counter's last word, is 0: the race that picks a token.
    """
    first = counters.to(tl.uint32, bitcast=True)
    zero = tl.zeros_like(first)
    second = zero + position.to(tl.uint32, bitcast=True)
    third = zero + choice.to(tl.uint32, bitcast=True)
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    return tl.philox_impl(first, second, third, zero, low, high)


@triton.jit
def ordered(value):
    """uint32 in the order of the float32."""
    bits = value.to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (flipped ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def unordered(key):
    """The float32 of `ordered`."""
    flipped = key.to(tl.int32, bitcast=True) ^ -0x80000000
    return (flipped ^ ((flipped >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
