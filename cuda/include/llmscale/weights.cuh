// Weight formats in fragment order: how 16 bytes per lane become the left operand of a tensor-core product.
// Owns the meaning of a packed word; cuda/README.md states the layout and python/llmscale/cuda/fragment_order.py makes
// it. A chunk is 64 columns x 64 of depth, contiguous; it has four tiles of 16 columns, and a lane's part of a tile is
// `loads_per_tile` times 16 bytes. Knows nothing of scales, rows and the order in which chunks are visited.
#pragma once

#include "llmscale/e4m3.cuh"

namespace llmscale {

constexpr int chunk_columns = 64;
constexpr int chunk_depth = 64;
constexpr int tile_columns = 16;

// Unsigned 4 bits. Word k16 of a lane is its whole fragment of 16 columns x 16 of depth: register i has nibble i in its
// low half and nibble i + 4 in its high half. 0x4300 | q is the bfloat16 128 + q, so one subtraction gives q - zero, exactly.
struct Int4Weights {
  static constexpr int loads_per_tile = 1;
  static constexpr int chunk_bytes = chunk_columns * chunk_depth / 2;
  static constexpr bool has_zero_points = true;
  static constexpr int smallest_whole_group = 64;  // of those that no chunk divides

  LLMSCALE_DEVICE static void fragment(const uint4 (&words)[loads_per_tile], int k16, const uint32_t (&negative_offsets)[2],
                                       uint32_t (&left)[4]) {
    const uint32_t word = k16 == 0 ? words[0].x : k16 == 1 ? words[0].y : k16 == 2 ? words[0].z : words[0].w;
    LLMSCALE_UNROLL
    for (int i = 0; i < 4; i++) {
      const uint32_t biased = (word >> (4 * i) & 0x000f000f) | 0x43004300;
      left[i] = bf16x2_fma(biased, 0x3f803f80, negative_offsets[i % 2]);
    }
  }

  // -(128 + zero) twice, for the rows of a fragment that registers 0 and 2, or 1 and 3, belong to.
  LLMSCALE_DEVICE static uint32_t negative_offset(uint32_t zero) { return 0xc300c300 | zero | zero << 16; }
};

// e4m3. Of the four words of a half (32 of depth), words 2 j and 2 j + 1 are fragment j: the first has registers 0 (odd
// bytes) and 1 (even bytes), the second 2 and 3.
struct E4m3Weights {
  static constexpr int loads_per_tile = 2;
  static constexpr int chunk_bytes = chunk_columns * chunk_depth;
  static constexpr bool has_zero_points = false;
  static constexpr int smallest_whole_group = 128;

  LLMSCALE_DEVICE static void fragment(const uint4 (&words)[loads_per_tile], int k16, const uint32_t (&)[2],
                                       uint32_t (&left)[4]) {
    const uint4& half = words[k16 / 2];
    const uint32_t first = k16 % 2 == 0 ? half.x : half.z;
    const uint32_t second = k16 % 2 == 0 ? half.y : half.w;
    left[0] = e4m3_odd_bytes_to_bf16x2(first);
    left[1] = e4m3_even_bytes_to_bf16x2(first);
    left[2] = e4m3_odd_bytes_to_bf16x2(second);
    left[3] = e4m3_even_bytes_to_bf16x2(second);
  }

  LLMSCALE_DEVICE static uint32_t negative_offset(uint32_t) { return 0; }
};

}  // namespace llmscale
