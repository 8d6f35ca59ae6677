// 4-bit weights with scales (and zero points) per group of 32, 64 or 128, bfloat16 rows: y = x W^T for 1 to 64 rows.
// Owns the variants by number of rows and by groups per chunk; the arithmetic is in llmscale/weight_matmul.cuh, the
// launcher in python/llmscale/cuda/matmul.py chooses. Costs the bytes of W, 4.25 bits a weight at groups of 64.
#include "llmscale/weight_matmul.cuh"

namespace llmscale {

template <int row_eights, int groups_per_chunk>
using W4a16 = WeightMatmulBlock<Int4Weights, row_eights, row_eights <= 2 ? 4 : 2, 4, groups_per_chunk>;

}  // namespace llmscale

#define LLMSCALE_W4A16(name, row_eights, groups_per_chunk, blocks)                                                       \
  LLMSCALE_KERNEL(256, blocks)                                                                                           \
  name(const llmscale::bf16* __restrict__ x, const uint4* __restrict__ weights,                                          \
       const llmscale::bf16* __restrict__ scales, const uint8_t* __restrict__ zero_points, llmscale::bf16* y,            \
       float* partial_sums, uint32_t* arrivals, int rows, int columns, int depth, int group_shift) {                     \
    LLMSCALE_SHARED(shared);                                                                                             \
    const llmscale::WeightMatmul problem{x, weights, scales, zero_points, nullptr, y, partial_sums, arrivals, rows,      \
                                         columns, depth, group_shift};                                                   \
    llmscale::W4a16<row_eights, groups_per_chunk>(problem, shared).run();                                                \
  }

LLMSCALE_W4A16(w4a16_matmul_8_rows, 1, 1, 2)
LLMSCALE_W4A16(w4a16_matmul_16_rows, 2, 1, 2)
LLMSCALE_W4A16(w4a16_matmul_32_rows, 4, 1, 2)
LLMSCALE_W4A16(w4a16_matmul_64_rows, 8, 1, 1)
LLMSCALE_W4A16(w4a16_matmul_8_rows_group_32, 1, 2, 2)
LLMSCALE_W4A16(w4a16_matmul_16_rows_group_32, 2, 2, 2)
LLMSCALE_W4A16(w4a16_matmul_32_rows_group_32, 4, 2, 2)
LLMSCALE_W4A16(w4a16_matmul_64_rows_group_32, 8, 2, 1)
