// Stream-K (Osama et al., "Stream-K: Work-centric Parallel Decomposition", PPoPP 2023): every block gets the same number
// of iterations, whatever tiles they lie in. Owns the arithmetic of who has which iterations and where a partial sum is
// kept; python/llmscale/cuda/matmul_plan.py has the same arithmetic for the launcher. All O(1). It knows no matrices.
#pragma once

#include "llmscale/platform.cuh"

namespace llmscale {

struct StreamK {
  int64_t iterations;       // of all tiles
  int iterations_per_tile;
  int blocks;               // at most `iterations`

  LLMSCALE_DEVICE int64_t first_iteration(int block) const { return iterations * block / blocks; }

  LLMSCALE_DEVICE int block_of(int64_t iteration) const {
    return static_cast<int>(((iteration + 1) * blocks - 1) / iterations);
  }

  // A block has at most two partial sums: one of the tile that it begins in, one of the tile that it ends in.
  LLMSCALE_DEVICE int slot(int block, int tile) const {
    const int64_t tile_begin = static_cast<int64_t>(tile) * iterations_per_tile;
    return 2 * block + (first_iteration(block) >= tile_begin ? 0 : 1);
  }

  LLMSCALE_DEVICE int first_block(int tile) const { return block_of(static_cast<int64_t>(tile) * iterations_per_tile); }
  LLMSCALE_DEVICE int last_block(int tile) const {
    return block_of(static_cast<int64_t>(tile + 1) * iterations_per_tile - 1);
  }
};

}  // namespace llmscale
