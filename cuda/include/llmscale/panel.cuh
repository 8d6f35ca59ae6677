// Columns of a packed matrix as bfloat16, row-major: the way from fragment order back to what cuBLAS reads.
// Owns the turn: a warp takes one tile (16 columns x 64 of depth), writes its fragments to shared memory and reads whole
// rows back, so that every line of 128 bytes is written at once. Costs the packed bytes and 2 per weight. What a
// fragment's values are is the caller's.
#pragma once

#include "llmscale/weights.cuh"

namespace llmscale {

struct PanelShape {
  static constexpr int warps = 8;
  static constexpr int stride = chunk_depth + 8;  // elements; rows of 16 bytes then lie in different banks
  static constexpr int warp_bytes = tile_columns * stride * 2;
  static constexpr int shared_bytes = warps * warp_bytes;
};

// Where a warp's tile lies in the matrix.
struct PanelTile {
  int64_t column_chunk;
  int depth_chunks, chunk, tile, warp, lane;

  LLMSCALE_DEVICE PanelTile(int first_column, int depth) {
    warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    depth_chunks = (depth + chunk_depth - 1) / chunk_depth;
    chunk = static_cast<int>(blockIdx.x) * 2 + warp / 4;
    tile = warp % 4;
    column_chunk = first_column / chunk_columns + static_cast<int>(blockIdx.y);
  }

  template <class Weights>
  LLMSCALE_DEVICE void read(const uint4* weights, uint4 (&words)[Weights::loads_per_tile]) const {
    const int64_t first = (column_chunk * depth_chunks + chunk) * (Weights::chunk_bytes / 16) + lane;
    LLMSCALE_UNROLL
    for (int part = 0; part < Weights::loads_per_tile; part++) {
      words[part] = weights[first + (tile * Weights::loads_per_tile + part) * 32];
    }
  }

  // Of the scales and zero points of this lane's two columns, which are neighbours.
  LLMSCALE_DEVICE int64_t group_offset(int k16, int group_shift, int padded_columns) const {
    const int group = (chunk * chunk_depth + k16 * 16) >> group_shift;
    return static_cast<int64_t>(group) * padded_columns + column_chunk * chunk_columns + lane / 4 * 8 + tile * 2;
  }

  // The registers of fragment k16, as pairs of bfloat16 along the depth, to shared memory.
  LLMSCALE_DEVICE void put(unsigned char* shared, int k16, const uint32_t (&pairs)[4]) const {
    unsigned char* table = shared + warp * PanelShape::warp_bytes;
    LLMSCALE_UNROLL
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i % 2 * 8;
      const int k = k16 * 16 + i / 2 * 8 + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(table + (row * PanelShape::stride + k) * 2) = pairs[i];
    }
  }

  LLMSCALE_DEVICE void write(const unsigned char* shared, bf16* panel, int columns, int depth) const {
    const unsigned char* table = shared + warp * PanelShape::warp_bytes;
    warp_barrier();
    LLMSCALE_UNROLL
    for (int piece = lane; piece < tile_columns * 8; piece += 32) {
      const int row = piece / 8;
      const int k = piece % 8 * 8;
      const int column = static_cast<int>(blockIdx.y) * chunk_columns + tile * tile_columns + row;
      if (column >= columns || chunk * chunk_depth + k >= depth) continue;
      const uint4 value = *reinterpret_cast<const uint4*>(table + (row * PanelShape::stride + k) * 2);
      *reinterpret_cast<uint4*>(panel + static_cast<int64_t>(column) * depth + chunk * chunk_depth + k) = value;
    }
  }
};

}  // namespace llmscale
