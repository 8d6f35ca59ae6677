// Some columns of a 4-bit matrix as bfloat16, row-major, for cuBLAS: large batches are bound by arithmetic, not by bytes.
// Each element is (q - zero) * scale, rounded once. Costs 0.5 bytes read and 2 written per weight. It knows no rows of x.
#include "llmscale/panel.cuh"

// `first_column` is a multiple of 64; the panel has [columns][depth], and its columns end within the matrix.
LLMSCALE_KERNEL(256, 4)
w4_panel(const uint4* __restrict__ weights, const llmscale::bf16* __restrict__ scales,
         const uint8_t* __restrict__ zero_points, llmscale::bf16* __restrict__ panel, int first_column, int columns,
         int depth, int padded_columns, int group_shift) {
  using namespace llmscale;
  LLMSCALE_SHARED(shared);
  const PanelTile tile(first_column, depth);
  if (tile.chunk >= tile.depth_chunks) return;
  uint4 words[Int4Weights::loads_per_tile];
  tile.read<Int4Weights>(weights, words);
  LLMSCALE_UNROLL
  for (int k16 = 0; k16 < 4; k16++) {
    const int64_t at = tile.group_offset(k16, group_shift, padded_columns);
    const uint32_t scale_pair = *reinterpret_cast<const uint32_t*>(scales + at);
    const uint32_t zeros = zero_points == nullptr ? 0x0808 : *reinterpret_cast<const uint16_t*>(zero_points + at);
    const uint32_t both_scales[2] = {(scale_pair & 0xffff) * 0x10001, (scale_pair >> 16) * 0x10001};
    const uint32_t negative_offsets[2] = {Int4Weights::negative_offset(zeros & 0xff), Int4Weights::negative_offset(zeros >> 8)};
    uint32_t pairs[4];
    Int4Weights::fragment(words, k16, negative_offsets, pairs);
    LLMSCALE_UNROLL
    for (int i = 0; i < 4; i++) pairs[i] = bf16x2_fma(pairs[i], both_scales[i % 2], 0x80008000);
    tile.put(shared, k16, pairs);
  }
  tile.write(shared, panel, columns, depth);
}
