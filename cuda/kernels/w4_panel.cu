// Some columns of a 4-bit matrix as bfloat16, row-major, for cuBLAS: large batches are bound by arithmetic, not by bytes.
// A warp turns one tile (16 columns x 64 of depth) around in shared memory and writes whole lines of 128 bytes. Each
// element is (q - zero) * scale, rounded once. Costs 0.5 bytes read and 2 written per weight. It knows no rows of x.
#include "llmscale/weights.cuh"

namespace llmscale {

struct PanelShape {
  static constexpr int warps = 8;
  static constexpr int stride = chunk_depth + 8;  // elements; rows of 16 bytes then lie in different banks
  static constexpr int warp_bytes = tile_columns * stride * 2;
  static constexpr int shared_bytes = warps * warp_bytes;
};

}  // namespace llmscale

// `first_column` is a multiple of 64; the panel has [columns][depth], and its columns end within the matrix.
LLMSCALE_KERNEL(256, 4)
w4_panel(const uint4* __restrict__ weights, const llmscale::bf16* __restrict__ scales,
         const uint8_t* __restrict__ zero_points, llmscale::bf16* __restrict__ panel, int first_column, int columns,
         int depth, int padded_columns, int group_shift) {
  using namespace llmscale;
  LLMSCALE_SHARED(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int depth_chunks = (depth + chunk_depth - 1) / chunk_depth;
  const int chunk = static_cast<int>(blockIdx.x) * 2 + warp / 4;
  const int tile = warp % 4;
  if (chunk >= depth_chunks) return;

  const int64_t column_chunk = first_column / chunk_columns + static_cast<int>(blockIdx.y);
  const uint4 words[1] = {weights[((column_chunk * depth_chunks + chunk) * 4 + tile) * 32 + lane]};
  unsigned char* table = shared + warp * PanelShape::warp_bytes;
  LLMSCALE_UNROLL
  for (int k16 = 0; k16 < 4; k16++) {
    const int group = (chunk * chunk_depth + k16 * 16) >> group_shift;
    const int64_t at = static_cast<int64_t>(group) * padded_columns + column_chunk * chunk_columns + lane / 4 * 8 + tile * 2;
    const uint32_t scale_pair = *reinterpret_cast<const uint32_t*>(scales + at);
    const uint32_t zeros = zero_points == nullptr ? 0x0808 : *reinterpret_cast<const uint16_t*>(zero_points + at);
    const uint32_t both_scales[2] = {(scale_pair & 0xffff) * 0x10001, (scale_pair >> 16) * 0x10001};
    const uint32_t negative_offsets[2] = {Int4Weights::negative_offset(zeros & 0xff), Int4Weights::negative_offset(zeros >> 8)};
    uint32_t left[4];
    Int4Weights::fragment(words, k16, negative_offsets, left);
    LLMSCALE_UNROLL
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i % 2 * 8;
      const int k = k16 * 16 + i / 2 * 8 + lane % 4 * 2;
      const uint32_t pair = bf16x2_fma(left[i], both_scales[i % 2], 0x80008000);
      *reinterpret_cast<uint32_t*>(table + (row * PanelShape::stride + k) * 2) = pair;
    }
  }
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
