// y = x W^T for few rows of x (1 to 64) and weights of 4 or 8 bits, bound by the bytes of W that a step reads.
// Owns the skeleton that all formats share: a ring of stages filled by asynchronous copies, weights as the left operand
// of m16n8k16 products (so that rows come in eights), depth split over warps and over blocks (stream-K), sums in float32.
// Sums meet in a fixed order, so equal launches give equal bits. Reads each weight once; x comes from L2 once per 128 columns.
// The idea of fragment order is Marlin's (Frantar et al., PPoPP 2025). It knows formats by their interface in weights.cuh only.
#pragma once

#include "llmscale/stream_k.cuh"
#include "llmscale/weights.cuh"

namespace llmscale {

struct WeightMatmul {
  const bf16* x;                // [rows, depth]
  const uint4* weights;         // [padded columns / 64][padded depth / 64] chunks
  const bf16* group_scales;     // [groups][padded columns], permuted; null: 1
  const uint8_t* zero_points;   // the same shape; null: 8
  const float* column_scales;   // [padded columns]; null: 1
  bf16* y;                      // [rows, columns]
  float* partial_sums;          // [2 blocks][rows][128]
  uint32_t* arrivals;           // [padded columns / 128], zero, and zero again when the launch ends
  int rows, columns, depth, group_shift;
};

template <class Weights, int row_eights, int depth_warps, int stages, int groups_per_chunk>
struct WeightMatmulBlock {
  static constexpr int threads = 256;
  static constexpr int warps = threads / 32;
  static constexpr int column_warps = warps / depth_warps;
  static constexpr int columns = 128;
  static constexpr int warp_tiles = columns / tile_columns / column_warps;
  static constexpr int pass_tiles = row_eights == 4 ? 1 : 2;
  static constexpr int rows = 8 * row_eights;
  static constexpr int depth = chunk_depth * depth_warps;
  static constexpr int smallest_group = groups_per_chunk == 1 ? Weights::smallest_whole_group : chunk_depth / groups_per_chunk;
  static constexpr int max_stage_groups = depth / smallest_group;

  // 16 bytes of padding per row: eight rows of a matrix then lie in 32 different banks.
  static constexpr int x_stride = depth + 8;
  static constexpr int x_bytes = rows * x_stride * 2;
  static constexpr int weight_bytes = columns / chunk_columns * depth_warps * Weights::chunk_bytes;
  static constexpr int scale_bytes = max_stage_groups * columns * 2;
  static constexpr int zero_bytes = Weights::has_zero_points ? max_stage_groups * columns : 0;
  static constexpr int stage_bytes = x_bytes + weight_bytes + scale_bytes + zero_bytes;

  // Rows of the reduction are 132 floats apart, so that the lanes of a fragment write to 32 different banks.
  static constexpr int sum_stride = columns + 4;
  static constexpr int sum_bytes = depth_warps * rows * sum_stride * 4;
  static constexpr int shared_bytes = stages * stage_bytes > sum_bytes ? stages * stage_bytes : sum_bytes;

  const WeightMatmul& problem;
  unsigned char* shared;
  int warp, lane, depth_warp, column_warp;
  int depth_chunks, groups;
  float sums[warp_tiles][row_eights][4];

  LLMSCALE_DEVICE WeightMatmulBlock(const WeightMatmul& given, unsigned char* memory) : problem(given), shared(memory) {
    warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    depth_warp = warp / column_warps;
    column_warp = warp % column_warps;
    depth_chunks = (problem.depth + chunk_depth - 1) / chunk_depth;
    groups = ((depth_chunks * chunk_depth - 1) >> problem.group_shift) + 1;
  }

  LLMSCALE_DEVICE int padded_columns() const { return (problem.columns + columns - 1) / columns * columns; }
  LLMSCALE_DEVICE unsigned char* x_of(int stage) const { return shared + stage * stage_bytes; }
  LLMSCALE_DEVICE unsigned char* weights_of(int stage) const { return x_of(stage) + x_bytes; }
  LLMSCALE_DEVICE unsigned char* scales_of(int stage) const { return weights_of(stage) + weight_bytes; }
  LLMSCALE_DEVICE unsigned char* zeros_of(int stage) const { return scales_of(stage) + scale_bytes; }

  // Starts the copies of one iteration: `depth` of x and of 128 columns of weights.
  LLMSCALE_DEVICE void load(int tile, int step, int stage) {
    load_x(step, stage);
    load_weights(tile, step, stage);
    if (problem.group_scales != nullptr) load_groups(tile, step, stage);
  }

  LLMSCALE_DEVICE void load_x(int step, int stage) {
    constexpr int pieces = depth / 8;
    constexpr int rows_at_once = threads / pieces;
    const int k = static_cast<int>(threadIdx.x) % pieces * 8;
    const int first_row = static_cast<int>(threadIdx.x) / pieces;
    const bool k_valid = step * depth + k < problem.depth;
    const bf16* source = problem.x + static_cast<int64_t>(first_row) * problem.depth + step * depth + k;
    unsigned char* target = x_of(stage) + (first_row * x_stride + k) * 2;
    for (int row = first_row; row < rows; row += rows_at_once) {
      bool valid = k_valid && row < problem.rows;
      if (LLMSCALE_PLANTED(row_past_the_end)) valid = k_valid && row <= problem.rows;
      copy_async(target, valid ? source : problem.x, valid);
      source += static_cast<int64_t>(rows_at_once) * problem.depth;
      target += rows_at_once * x_stride * 2;
    }
  }

  // A warp's tiles lie in one chunk, one after the other. A lane copies what it will read itself, so that weights need no
  // barrier.
  LLMSCALE_DEVICE void load_weights(int tile, int step, int stage) {
    const int chunk = step * depth_warps + depth_warp;
    if (chunk >= depth_chunks) return;
    const int64_t column_chunk = tile * (columns / chunk_columns) + column_warp * warp_tiles / 4;
    const uint4* source = problem.weights + (column_chunk * depth_chunks + chunk) * (Weights::chunk_bytes / 16) +
                          column_warp * warp_tiles % 4 * Weights::loads_per_tile * 32 + lane;
    unsigned char* target = weights_of(stage) + weight_offset();
    LLMSCALE_UNROLL
    for (int i = 0; i < warp_tiles * Weights::loads_per_tile; i++) copy_async(target + i * 512, source + i * 32, true);
  }

  // Of this lane's first 16 bytes in a stage; the next ones are 512 bytes apart.
  LLMSCALE_DEVICE int weight_offset() const {
    return ((depth_warp * (columns / tile_columns) + column_warp * warp_tiles) * Weights::loads_per_tile * 32 + lane) * 16;
  }

  LLMSCALE_DEVICE void load_groups(int tile, int step, int stage) {
    const int first = (step * depth) >> problem.group_shift;
    const int count = ((depth - 1) >> problem.group_shift) + 1;
    const int stride = padded_columns();
    constexpr int scale_pieces = columns / 8;
    for (int i = static_cast<int>(threadIdx.x); i < count * scale_pieces; i += threads) {
      const int group = first + i / scale_pieces;
      if (group >= groups) break;
      const int64_t from = static_cast<int64_t>(group) * stride + tile * columns + i % scale_pieces * 8;
      copy_async(scales_of(stage) + i * 16, problem.group_scales + from, true);
    }
    if (!Weights::has_zero_points || problem.zero_points == nullptr) return;
    constexpr int zero_pieces = columns / 16;
    for (int i = static_cast<int>(threadIdx.x); i < count * zero_pieces; i += threads) {
      const int group = first + i / zero_pieces;
      if (group >= groups) break;
      const int64_t from = static_cast<int64_t>(group) * stride + tile * columns + i % zero_pieces * 16;
      copy_async(zeros_of(stage) + i * 16, problem.zero_points + from, true);
    }
  }

  // A pass takes some of the warp's tiles, because the sums of a group are held beside those of all groups: with all tiles
  // at once the variants of 16 and of 32 rows spilled 60 bytes at 128 registers, and so did two groups at once. Rows of x
  // are read once per pass.
  LLMSCALE_DEVICE void multiply(int step, int stage) {
    if (step * depth_warps + depth_warp >= depth_chunks) return;
    LLMSCALE_UNROLL
    for (int first = 0; first < warp_tiles; first += pass_tiles) {
      LLMSCALE_NO_UNROLL
      for (int group = 0; group < groups_per_chunk; group++) multiply_group(stage, first, group);
    }
  }

  // Sums of one group, scaled once it is complete: float32, where scaled weights would have been rounded to bfloat16.
  LLMSCALE_DEVICE void multiply_group(int stage, int first, int group) {
    uint4 words[pass_tiles][Weights::loads_per_tile];
    LLMSCALE_UNROLL
    for (int t = 0; t < pass_tiles; t++) {
      LLMSCALE_UNROLL
      for (int part = 0; part < Weights::loads_per_tile; part++) {
        const int unit = (first + t) * Weights::loads_per_tile + part;
        words[t][part] = *reinterpret_cast<const uint4*>(weights_of(stage) + weight_offset() + unit * 512);
      }
    }
    float group_sums[pass_tiles][row_eights][4] = {};
    float scales[pass_tiles][2];
    uint32_t negative_offsets[pass_tiles][2];
    read_groups(stage, first, group, scales, negative_offsets);
    LLMSCALE_UNROLL
    for (int k32 = 0; k32 < 2 / groups_per_chunk; k32++) {
      multiply_k32(stage, group * (2 / groups_per_chunk) + k32, words, negative_offsets, group_sums);
    }
    LLMSCALE_UNROLL
    for (int t = 0; t < pass_tiles; t++) {
      LLMSCALE_UNROLL
      for (int m = 0; m < row_eights; m++) {
        LLMSCALE_UNROLL
        for (int i = 0; i < 4; i++) sums[first + t][m][i] += group_sums[t][m][i] * scales[t][i / 2];
      }
    }
  }

  LLMSCALE_DEVICE void multiply_k32(int stage, int k32, const uint4 (&words)[pass_tiles][Weights::loads_per_tile],
                                    const uint32_t (&negative_offsets)[pass_tiles][2],
                                    float (&group_sums)[pass_tiles][row_eights][4]) {
    LLMSCALE_UNROLL
    for (int j = 0; j < 2; j++) {
      uint32_t right[row_eights][2];
      read_x(stage, k32 * 2 + j, right);
      LLMSCALE_UNROLL
      for (int t = 0; t < pass_tiles; t++) {
        uint32_t left[4];
        Weights::fragment(words[t], k32 * 2 + j, negative_offsets[t], left);
        LLMSCALE_UNROLL
        for (int m = 0; m < row_eights; m++) multiply_accumulate(group_sums[t][m], left, right[m][0], right[m][1]);
      }
    }
  }

  // The right operands of 16 of depth: four matrices are two eights of rows. For a single eight half of them is read twice.
  LLMSCALE_DEVICE void read_x(int stage, int k16, uint32_t (&right)[row_eights][2]) const {
    const bf16* x = reinterpret_cast<const bf16*>(x_of(stage)) + depth_warp * chunk_depth + k16 * 16;
    uint32_t matrices[4];
    if constexpr (row_eights == 1) {
      load_matrices(matrices, x + lane % 8 * x_stride + lane / 8 % 2 * 8);
      right[0][0] = matrices[0];
      right[0][1] = matrices[1];
    } else {
      LLMSCALE_UNROLL
      for (int m = 0; m < row_eights / 2; m++) {
        load_matrices(matrices, x + (m * 16 + lane / 16 * 8 + lane % 8) * x_stride + lane / 8 % 2 * 8);
        right[2 * m][0] = matrices[0];
        right[2 * m][1] = matrices[1];
        right[2 * m + 1][0] = matrices[2];
        right[2 * m + 1][1] = matrices[3];
      }
    }
  }

  // Scale and zero point of the two columns per tile that this lane's sums belong to: lane / 4 and lane / 4 + 8.
  LLMSCALE_DEVICE void read_groups(int stage, int first, int group, float (&scales)[pass_tiles][2],
                                   uint32_t (&negative_offsets)[pass_tiles][2]) const {
    const int chunk_in_stage = depth_warp * chunk_depth + group * (chunk_depth / groups_per_chunk);
    const int first_tile = column_warp * warp_tiles;
    const int base = (chunk_in_stage >> problem.group_shift) * columns + first_tile / 4 * chunk_columns + lane / 4 * 8 +
                     first_tile % 4 * 2 + first * 2;
    LLMSCALE_UNROLL
    for (int t = 0; t < pass_tiles; t++) {
      const int at = base + t * 2;
      uint32_t pair = 0x3f803f80;
      if (problem.group_scales != nullptr) pair = *reinterpret_cast<const uint32_t*>(scales_of(stage) + at * 2);
      scales[t][0] = bits_to_float(pair << 16);
      scales[t][1] = bits_to_float(pair & 0xffff0000);
      uint32_t zeros = 0x0808;
      if (Weights::has_zero_points && problem.zero_points != nullptr) {
        zeros = *reinterpret_cast<const uint16_t*>(zeros_of(stage) + at);
      }
      negative_offsets[t][0] = Weights::negative_offset(zeros & 0xff);
      negative_offsets[t][1] = Weights::negative_offset(zeros >> 8);
    }
  }

  // The sums of iterations [first, last) of one tile.
  LLMSCALE_DEVICE void accumulate(int tile, int first, int last) {
    LLMSCALE_UNROLL
    for (int t = 0; t < warp_tiles; t++) {
      LLMSCALE_UNROLL
      for (int m = 0; m < row_eights; m++) {
        LLMSCALE_UNROLL
        for (int i = 0; i < 4; i++) sums[t][m][i] = 0.0f;
      }
    }
    LLMSCALE_UNROLL
    for (int i = 0; i < stages - 1; i++) {
      if (first + i < last) load(tile, first + i, i);
      copy_async_commit();
    }
    int stage = 0;
    int free_stage = stages - 1;
    for (int step = first; step < last; step++) {
      if (!LLMSCALE_PLANTED(no_wait_for_copy)) copy_async_wait<stages - 2>();
      // x has landed for all threads, and all warps have left the stage that is filled next.
      block_barrier();
      if (step + stages - 1 < last) load(tile, step + stages - 1, free_stage);
      copy_async_commit();
      multiply(step, stage);
      stage = stage + 1 == stages ? 0 : stage + 1;
      free_stage = free_stage + 1 == stages ? 0 : free_stage + 1;
    }
    copy_async_wait<0>();
  }

  // The warps of all depths meet in shared memory, which is the ring's.
  LLMSCALE_DEVICE void reduce() {
    if (!LLMSCALE_PLANTED(no_barrier_before_reuse)) block_barrier();
    float* table = reinterpret_cast<float*>(shared) + depth_warp * rows * sum_stride;
    LLMSCALE_UNROLL
    for (int t = 0; t < warp_tiles; t++) {
      const int column = (column_warp * warp_tiles + t) * tile_columns + lane / 4;
      LLMSCALE_UNROLL
      for (int m = 0; m < row_eights; m++) {
        LLMSCALE_UNROLL
        for (int i = 0; i < 4; i++) {
          table[(m * 8 + lane % 4 * 2 + i % 2) * sum_stride + column + i / 2 * 8] = sums[t][m][i];
        }
      }
    }
    block_barrier();
  }

  LLMSCALE_DEVICE float reduced(int row, int column) const {
    const float* table = reinterpret_cast<const float*>(shared) + row * sum_stride + column;
    float sum = 0.0f;
    LLMSCALE_UNROLL
    for (int part = 0; part < depth_warps; part++) sum += table[part * rows * sum_stride];
    return sum;
  }

  LLMSCALE_DEVICE void write(int tile, int row, int column, float sum) const {
    const int global = tile * columns + column;
    if (global >= problem.columns) return;
    if (problem.column_scales != nullptr) sum *= problem.column_scales[global];
    problem.y[static_cast<int64_t>(row) * problem.columns + global] = float_to_bf16(sum);
  }

  LLMSCALE_DEVICE void write_tile(int tile) const {
    for (int i = static_cast<int>(threadIdx.x); i < problem.rows * columns; i += threads) {
      write(tile, i / columns, i % columns, reduced(i / columns, i % columns));
    }
  }

  LLMSCALE_DEVICE float* partial(int slot) const {
    return problem.partial_sums + static_cast<int64_t>(slot) * problem.rows * columns;
  }

  // Leaves this block's part of a tile in memory. The block that finds all others there adds them up, in their order.
  LLMSCALE_DEVICE void contribute(const StreamK& work, int tile) {
    float* mine = partial(work.slot(static_cast<int>(blockIdx.x), tile));
    for (int i = static_cast<int>(threadIdx.x); i < problem.rows * columns; i += threads) {
      mine[i] = reduced(i / columns, i % columns);
    }
    device_fence();
    block_barrier();
    const int first = work.first_block(tile);
    const int last = work.last_block(tile);
    uint32_t* before = reinterpret_cast<uint32_t*>(shared);
    if (threadIdx.x == 0) *before = atomic_add(problem.arrivals + tile, 1);
    block_barrier();
    if (*before != static_cast<uint32_t>(last - first)) return;
    device_fence();
    for (int i = static_cast<int>(threadIdx.x); i < problem.rows * columns; i += threads) {
      float sum = 0.0f;
      for (int block = first; block <= last; block++) sum += load_from_l2(partial(work.slot(block, tile)) + i);
      write(tile, i / columns, i % columns, sum);
    }
    if (threadIdx.x == 0) problem.arrivals[tile] = 0;
  }

  LLMSCALE_DEVICE void run() {
    const int per_tile = (problem.depth + depth - 1) / depth;
    const int tiles = padded_columns() / columns;
    const StreamK work{static_cast<int64_t>(per_tile) * tiles, per_tile, static_cast<int>(gridDim.x)};
    const int block = static_cast<int>(blockIdx.x);
    const int64_t end = work.first_iteration(block + 1);
    for (int64_t at = work.first_iteration(block); at < end;) {
      const int tile = static_cast<int>(at / per_tile);
      const int first = static_cast<int>(at % per_tile);
      const int last = end - at < per_tile - first ? first + static_cast<int>(end - at) : per_tile;
      accumulate(tile, first, last);
      reduce();
      if (first == 0 && last == per_tile) {
        write_tile(tile);
      } else {
        contribute(work, tile);
      }
      at += last - first;
      block_barrier();  // the ring is filled again
    }
  }
};

}  // namespace llmscale
