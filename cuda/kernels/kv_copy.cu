// KV blocks from one region to another, each with an index of its own on either side; either may be pinned host memory.
// Owns two ways: bulk copies (sm_90), where one thread per CTA keeps a ring of 192 KiB under way, so that a few of
// them fill a link and the other multiprocessors stay with the model; and loads of 16 bytes by all threads, for what is
// older. Bandwidth is bytes under way per round trip. Blocks have the same size on both sides, a multiple of 16.
#include "llmscale/platform.cuh"

namespace llmscale {

struct CopyRing {
  static constexpr int stages = 12;
  static constexpr int stage_bytes = 16384;
  static constexpr int stores_reading = 4;  // stores that may still read their stage when the next load is issued
  static constexpr int shared_bytes = stages * stage_bytes + stages * 8;
};

struct BlockCopies {
  const unsigned char* source;
  unsigned char* target;
  const int32_t* source_blocks;
  const int32_t* target_blocks;
  int count;
  int block_bytes;
};

// Piece `item` of all blocks, in pieces of at most `piece_bytes`.
struct Piece {
  const unsigned char* from;
  unsigned char* to;
  uint32_t bytes;

  LLMSCALE_DEVICE Piece(const BlockCopies& copies, int64_t item, int piece_bytes) {
    const int pieces = (copies.block_bytes + piece_bytes - 1) / piece_bytes;
    const int block = static_cast<int>(item / pieces);
    const int offset = static_cast<int>(item % pieces) * piece_bytes;
    from = copies.source + static_cast<int64_t>(copies.source_blocks[block]) * copies.block_bytes + offset;
    to = copies.target + static_cast<int64_t>(copies.target_blocks[block]) * copies.block_bytes + offset;
    const int left = copies.block_bytes - offset;
    bytes = static_cast<uint32_t>(left < piece_bytes ? left : piece_bytes);
  }
};

LLMSCALE_DEVICE int64_t pieces_of(const BlockCopies& copies, int piece_bytes) {
  return static_cast<int64_t>(copies.count) * ((copies.block_bytes + piece_bytes - 1) / piece_bytes);
}

#if defined(LLMSCALE_HAS_BULK_COPY)
LLMSCALE_DEVICE void copy_by_ring(const BlockCopies& copies, unsigned char* shared) {
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + CopyRing::stages * CopyRing::stage_bytes);
  const int64_t items = pieces_of(copies, CopyRing::stage_bytes);
  const int64_t stride = static_cast<int64_t>(gridDim.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x);
  const int64_t mine = first < items ? (items - first + stride - 1) / stride : 0;
  for (int stage = 0; stage < CopyRing::stages; stage++) transfer_barrier_init(&full[stage], 1);
  const auto load = [&](int64_t step) {
    if (step >= mine) return;
    const int stage = static_cast<int>(step % CopyRing::stages);
    const Piece piece(copies, first + step * stride, CopyRing::stage_bytes);
    transfer_barrier_expect(&full[stage], piece.bytes);
    bulk_load(shared + stage * CopyRing::stage_bytes, piece.from, piece.bytes, &full[stage]);
  };
  for (int step = 0; step < CopyRing::stages; step++) load(step);
  for (int64_t step = 0; step < mine; step++) {
    const int stage = static_cast<int>(step % CopyRing::stages);
    const Piece piece(copies, first + step * stride, CopyRing::stage_bytes);
    transfer_barrier_wait(&full[stage], static_cast<uint32_t>(step / CopyRing::stages % 2));
    bulk_store(piece.to, shared + stage * CopyRing::stage_bytes, piece.bytes);
    bulk_commit();
    if (step >= CopyRing::stores_reading) {
      if (!LLMSCALE_PLANTED(no_wait_for_store)) bulk_wait_read<CopyRing::stores_reading>();
      load(step - CopyRing::stores_reading + CopyRing::stages);
    }
  }
  bulk_wait<0>();
}
#endif

}  // namespace llmscale

// Below sm_90 it traps, because a copy that silently does nothing is worse; the launcher asks for the other kernel there.
LLMSCALE_KERNEL(32, 1)
kv_copy_bulk(const unsigned char* __restrict__ source, unsigned char* __restrict__ target,
             const int32_t* __restrict__ source_blocks, const int32_t* __restrict__ target_blocks, int count,
             int block_bytes) {
#if defined(LLMSCALE_HAS_BULK_COPY)
  LLMSCALE_SHARED(shared);
  if (threadIdx.x == 0) llmscale::copy_by_ring({source, target, source_blocks, target_blocks, count, block_bytes}, shared);
#else
  llmscale::trap();
#endif
}

LLMSCALE_KERNEL(512, 1)
kv_copy_loads(const unsigned char* __restrict__ source, unsigned char* __restrict__ target,
              const int32_t* __restrict__ source_blocks, const int32_t* __restrict__ target_blocks, int count,
              int block_bytes) {
  using namespace llmscale;
  constexpr int piece_bytes = 65536;
  constexpr int under_way = 4;  // loads of a thread before its first store
  const BlockCopies copies{source, target, source_blocks, target_blocks, count, block_bytes};
  const int64_t items = pieces_of(copies, piece_bytes);
  const int threads = static_cast<int>(blockDim.x);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Piece piece(copies, item, piece_bytes);
    const uint4* from = reinterpret_cast<const uint4*>(piece.from);
    uint4* to = reinterpret_cast<uint4*>(piece.to);
    const int units = static_cast<int>(piece.bytes / 16);
    int i = static_cast<int>(threadIdx.x);
    for (; i + (under_way - 1) * threads < units; i += under_way * threads) {
      uint4 values[under_way];
      LLMSCALE_UNROLL
      for (int j = 0; j < under_way; j++) values[j] = from[i + j * threads];
      LLMSCALE_UNROLL
      for (int j = 0; j < under_way; j++) to[i + j * threads] = values[j];
    }
    for (; i < units; i += threads) to[i] = from[i];
  }
}
