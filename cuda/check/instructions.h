// The host twin of every instruction in llmscale/instructions_device.cuh: the same name, shape and meaning.
// Tensor-core fragments are emulated lane by lane, so that a wrong layout gives a wrong product; asynchronous copies land
// late or early by the seed; misaligned bulk copies, which trap on a device, fail the launch. Products are rounded as
// the hardware's within float32: sums run in ascending k, a device's order is not documented.
#pragma once

#include "check/emulation.h"

namespace llmscale {

inline void block_barrier() { check::machine().block_barrier(); }

inline void warp_barrier() {
  const uint64_t nothing = 0;
  check::machine().exchange(check::Exchange::barrier, &nothing, 1);
}

inline float warp_shuffle_xor(float value, int mask) {
  const uint64_t word = float_to_bits(value);
  const auto* lanes = check::machine().exchange(check::Exchange::shuffle, &word, 1);
  return bits_to_float(static_cast<uint32_t>(lanes[check::machine().lane() ^ static_cast<unsigned>(mask)][0]));
}

inline void device_fence() {}

inline uint32_t atomic_add(uint32_t* counter, uint32_t value) {
  const uint32_t before = *counter;
  *counter += value;
  return before;
}

inline float load_from_l2(const float* pointer) { return *pointer; }

// Not fmaxf: glibc's answers a signaling NaN with NaN.
inline float maximum(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }

// Nearest even, NaN kept.
inline bf16 float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float bf16_half(uint32_t pair, int half) { return bits_to_float(half == 0 ? pair << 16 : pair & 0xffff0000u); }

inline uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 2; half++) {
    // The product of two bfloat16 is exact in float64, and so is this sum for the values that kernels use.
    const double exact = static_cast<double>(bf16_half(a, half)) * bf16_half(b, half) + bf16_half(c, half);
    result |= static_cast<uint32_t>(float_to_bf16(static_cast<float>(exact))) << (16 * half);
  }
  return result;
}

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  const uint64_t word = reinterpret_cast<uint64_t>(row);
  if (word % 16 != 0) check::machine().fail("a row of load_matrices is not aligned to 16 bytes");
  const auto* lanes = check::machine().exchange(check::Exchange::load_matrices, &word, 1);
  const unsigned lane = check::machine().lane();
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    const char* source = reinterpret_cast<const char*>(lanes[matrix * 8 + lane / 4][0]) + lane % 4 * 4;
    memcpy(&fragment[matrix], source, 4);
  }
}

inline void multiply_accumulate(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  const uint64_t words[6] = {left[0], left[1], left[2], left[3], right0, right1};
  const auto* lanes = check::machine().exchange(check::Exchange::multiply_accumulate, words, 6);
  const unsigned group = check::machine().lane() / 4;
  const unsigned quad = check::machine().lane() % 4;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = group + i / 2 * 8;
    const unsigned column = quad * 2 + i % 2;
    for (unsigned k = 0; k < 16; k++) {
      const unsigned holder = k % 8 / 2;
      const auto a = static_cast<uint32_t>(lanes[row % 8 * 4 + holder][row / 8 + k / 8 * 2]);
      const auto b = static_cast<uint32_t>(lanes[column * 4 + holder][4 + k / 8]);
      sums[i] += bf16_half(a, k % 2) * bf16_half(b, k % 2);
    }
  }
}

// ---- copies of 16 bytes

inline void copy_async(void* shared, const void* global, bool valid) {
  if ((reinterpret_cast<uint64_t>(shared) | reinterpret_cast<uint64_t>(global)) % 16 != 0) {
    check::machine().fail("copy_async is not aligned to 16 bytes");
  }
  const check::Copy copy{shared, global, valid ? 16u : 0u};
  if (check::machine().lands_early()) {
    std::vector<check::Copy> now{copy};
    check::Machine::land(now);
  } else {
    check::machine().thread().open.push_back(copy);
  }
}

inline void copy_async_commit() {
  check::Thread& thread = check::machine().thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int pending>
inline void copy_async_wait() {
  auto& groups = check::machine().thread().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    check::Machine::land(groups.front());
    groups.erase(groups.begin());
  }
}

// ---- copies of kilobytes

#define LLMSCALE_HAS_BULK_COPY 1

inline check::TransferBarrier& transfer_barrier(uint64_t* barrier) {
  const auto found = check::machine().transfer_barriers().find(barrier);
  if (found == check::machine().transfer_barriers().end()) check::machine().fail("a transfer barrier without init");
  return found->second;
}

inline void transfer_barrier_init(uint64_t* barrier, uint32_t arrivals) {
  *barrier = 0;  // touched, so that a barrier outside of shared memory is seen
  check::TransferBarrier fresh;
  fresh.arrivals = fresh.pending = arrivals;
  check::machine().transfer_barriers()[barrier] = fresh;
}

inline void transfer_barrier_expect(uint64_t* barrier, uint32_t bytes) {
  check::TransferBarrier& state = transfer_barrier(barrier);
  if (state.pending == 0) check::machine().fail("more arrivals at a transfer barrier than it was made for");
  state.pending--;
  state.expected_bytes += bytes;
  check::machine().progress();
}

inline void transfer_barrier_wait(uint64_t* barrier, uint32_t parity) {
  for (;;) {
    check::TransferBarrier& state = transfer_barrier(barrier);
    if (state.phase % 2 != parity) return;
    if (state.pending == 0) {
      for (const check::Copy& copy : state.copies) state.expected_bytes -= copy.bytes;
      check::Machine::land(state.copies);
      if (state.expected_bytes == 0) {
        state.phase++;
        state.pending = state.arrivals;
        check::machine().progress();
        continue;
      }
    }
    check::machine().yield();
  }
}

inline void require_bulk_alignment(const void* to, const void* from, uint32_t bytes) {
  if ((reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | bytes) % 16 != 0 || bytes == 0) {
    check::machine().fail("a bulk copy of pointers or bytes that are not multiples of 16");
  }
}

inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  require_bulk_alignment(shared, global, bytes);
  check::TransferBarrier& state = transfer_barrier(barrier);
  if (check::machine().lands_early()) {
    memcpy(shared, global, bytes);
    state.expected_bytes -= bytes;
  } else {
    state.copies.push_back({shared, global, bytes});
  }
}

inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  require_bulk_alignment(global, shared, bytes);
  check::machine().thread().open_stores.push_back({global, shared, bytes});
}

inline void bulk_commit() {
  check::Thread& thread = check::machine().thread();
  thread.store_groups.push_back(std::move(thread.open_stores));
  thread.open_stores.clear();
}

template <int pending>
inline void bulk_wait_read() {
  auto& groups = check::machine().thread().store_groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    check::Machine::land(groups.front());
    groups.erase(groups.begin());
  }
}

template <int pending>
inline void bulk_wait() {
  bulk_wait_read<pending>();
}

}  // namespace llmscale
