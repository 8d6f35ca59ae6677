// Some columns of an e4m3 matrix as bfloat16, row-major, for cuBLAS: what w4_panel is for 4 bits.
// Each element is (value * group scale) * column scale in float32, rounded once to bfloat16; the first product is exact.
// Costs 1 byte read and 2 written per weight. It knows no rows of x.
#include "llmscale/panel.cuh"

// `first_column` is a multiple of 64; either scales may be null, for 1.
LLMSCALE_KERNEL(256, 4)
w8_panel(const uint4* __restrict__ weights, const llmscale::bf16* __restrict__ group_scales,
         const float* __restrict__ column_scales, llmscale::bf16* __restrict__ panel, int first_column, int columns,
         int depth, int padded_columns) {
  using namespace llmscale;
  LLMSCALE_SHARED(shared);
  const PanelTile tile(first_column, depth);
  if (tile.chunk >= tile.depth_chunks) return;
  uint4 words[E4m3Weights::loads_per_tile];
  tile.read<E4m3Weights>(weights, words);
  float per_column[2] = {1.0f, 1.0f};
  if (column_scales != nullptr) {
    const int64_t first = tile.column_chunk * chunk_columns + tile.tile * tile_columns + tile.lane / 4;
    per_column[0] = column_scales[first];
    per_column[1] = column_scales[first + 8];
  }
  LLMSCALE_UNROLL
  for (int k16 = 0; k16 < 4; k16++) {
    uint32_t scale_pair = 0x3f803f80;
    if (group_scales != nullptr) {
      scale_pair = *reinterpret_cast<const uint32_t*>(group_scales + tile.group_offset(k16, 7, padded_columns));
    }
    const float per_group[2] = {bits_to_float(scale_pair << 16), bits_to_float(scale_pair & 0xffff0000)};
    const uint32_t unused[2] = {0, 0};
    uint32_t pairs[4];
    E4m3Weights::fragment(words, k16, unused, pairs);
    LLMSCALE_UNROLL
    for (int i = 0; i < 4; i++) {
      const uint32_t low = float_to_bf16(bits_to_float(pairs[i] << 16) * per_group[i % 2] * per_column[i % 2]);
      const uint32_t high = float_to_bf16(bits_to_float(pairs[i] & 0xffff0000) * per_group[i % 2] * per_column[i % 2]);
      pairs[i] = low | high << 16;
    }
    tile.put(shared, k16, pairs);
  }
  tile.write(shared, panel, columns, depth);
}
