// The 8-bit float e4m3 (FN: no infinity, largest 448): from float32 and to pairs of bfloat16.
// Owns the rounding, nearest even with saturation, as OCP's "8-bit Floating Point Specification" 1.0 and torch's
// float8_e4m3fn have it; sm_89 has an instruction for it, below that about ten integer ones do. It knows no scales.
#pragma once

#include "llmscale/platform.cuh"

namespace llmscale {

LLMSCALE_DEVICE uint32_t float_to_e4m3(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 24 & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7f;   // NaN
  if (magnitude >= 0x43e80000) return sign | 0x7e;  // 464 and above: 448; 464 itself is a tie, and 448 is even
  if (magnitude < 0x3c800000) {
    // Below 2^-6 there are multiples of 2^-9 only. Adding 2^14 leaves just them in a float32's mantissa, rounded.
    const float shifted = bits_to_float(magnitude) + 16384.0f;
    return sign | (float_to_bits(shifted) - 0x46800000);
  }
  // Twenty of the 23 bits of the mantissa go; a carry runs into the exponent, as it must.
  const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
  return sign | ((rounded >> 20) - (120 << 3));
}

// Two at a time; `low` goes to the low byte.
LLMSCALE_DEVICE uint32_t floats_to_e4m3x2(float low, float high) {
#if defined(LLMSCALE_HAS_E4M3_CONVERSION)
  return floats_to_e4m3x2_native(low, high);
#else
  return float_to_e4m3(low) | float_to_e4m3(high) << 8;
#endif
}

// Bytes 1 and 3 of a word to two bfloat16, exactly: the bits of e4m3 in place of bfloat16's are the value times 2^-120.
// NaN, which no weight and no cached key is, becomes 480.
LLMSCALE_DEVICE uint32_t e4m3_odd_bytes_to_bf16x2(uint32_t word) {
  const uint32_t scaled = (word & 0x80008000) | (word >> 4 & 0x07f007f0);
  return bf16x2_fma(scaled, 0x7b807b80, 0x80008000);  // times 2^120, plus -0, which keeps the sign of a zero
}

LLMSCALE_DEVICE uint32_t e4m3_even_bytes_to_bf16x2(uint32_t word) { return e4m3_odd_bytes_to_bf16x2(word << 8); }

}  // namespace llmscale
