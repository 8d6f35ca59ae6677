// e4m3 weights with a scale per column, or per 128 of depth and column, bfloat16 rows: y = x W^T for 1 to 64 rows.
// Owns the variants by number of rows; the arithmetic is in llmscale/weight_matmul.cuh. Half the depth per stage of the
// 4-bit variants, because its bytes are twice theirs. Costs the bytes of W.
#include "llmscale/weight_matmul.cuh"

namespace llmscale {

template <int row_eights>
using W8a16 = WeightMatmulBlock<E4m3Weights, row_eights, 2, 4, 1>;

}  // namespace llmscale

#define LLMSCALE_W8A16(name, row_eights, blocks)                                                                         \
  LLMSCALE_KERNEL(256, blocks)                                                                                           \
  name(const llmscale::bf16* __restrict__ x, const uint4* __restrict__ weights,                                          \
       const llmscale::bf16* __restrict__ group_scales, const float* __restrict__ column_scales, llmscale::bf16* y,      \
       float* partial_sums, uint32_t* arrivals, int rows, int columns, int depth) {                                      \
    LLMSCALE_SHARED(shared);                                                                                             \
    const llmscale::WeightMatmul problem{x, weights, group_scales, nullptr, column_scales, y, partial_sums, arrivals,    \
                                         rows, columns, depth, 7};                                                       \
    llmscale::W8a16<row_eights>(problem, shared).run();                                                                  \
  }

LLMSCALE_W8A16(w8a16_matmul_8_rows, 1, 2)
LLMSCALE_W8A16(w8a16_matmul_16_rows, 2, 2)
LLMSCALE_W8A16(w8a16_matmul_32_rows, 4, 2)
LLMSCALE_W8A16(w8a16_matmul_64_rows, 8, 1)
