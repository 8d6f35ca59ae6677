// Every PTX instruction that the kernels use, one function each, with the same name and meaning as in check/instructions.h.
// A kernel holds no `asm` of its own: what is not here cannot be tested without a GPU. Shapes and fragment layouts are
// those of the PTX ISA (9.0), "Warp-level matrix instructions" and "Asynchronous copies"; costs are the hardware's.
#pragma once

namespace llmscale {

LLMSCALE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

LLMSCALE_DEVICE void block_barrier() { __syncthreads(); }
LLMSCALE_DEVICE void warp_barrier() { __syncwarp(); }
LLMSCALE_DEVICE float warp_shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Ends the launch with an error.
LLMSCALE_DEVICE void trap() { asm volatile("trap;"); }

// Orders this thread's global writes before its later ones, for readers in other blocks.
LLMSCALE_DEVICE void device_fence() { __threadfence(); }
LLMSCALE_DEVICE uint32_t atomic_add(uint32_t* counter, uint32_t value) { return atomicAdd(counter, value); }

// Reads past the L1 cache, which may hold what another block has overwritten.
LLMSCALE_DEVICE float load_from_l2(const float* pointer) { return __ldcg(pointer); }

// The larger one; a NaN counts as missing.
LLMSCALE_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

// ---- pairs of bfloat16 in one register, the first element in the low half

// a * b + c, rounded once. Subtraction and product are forms of it because sm_80 has no other bf16x2 instruction.
LLMSCALE_DEVICE uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

LLMSCALE_DEVICE bf16 float_to_bf16(float value) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define LLMSCALE_HAS_E4M3_CONVERSION 1
// Two floats to e4m3, nearest even, saturating; `low` goes to the low byte.
LLMSCALE_DEVICE uint16_t floats_to_e4m3x2_native(float low, float high) {
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
  return result;
}
#endif

// ---- tensor cores

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 aligned bytes of shared memory.
LLMSCALE_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums[16 x 8] += left[16 x 16] * right[16 x 8], bfloat16 in, float32 sums.
LLMSCALE_DEVICE void multiply_accumulate(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0,
                                         uint32_t right1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// ---- copies of 16 bytes into shared memory, past the L1 cache (sm_80)

// With `valid` false 16 zeros are written and nothing is read.
LLMSCALE_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
LLMSCALE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
LLMSCALE_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LLMSCALE_HAS_BULK_COPY 1

// ---- copies of kilobytes by one thread, counted by a barrier in shared memory (sm_90)

LLMSCALE_DEVICE void transfer_barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and makes the phase wait for `bytes` more.
LLMSCALE_DEVICE void transfer_barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase with this parity: the first phase of a barrier has parity 0.
LLMSCALE_DEVICE void transfer_barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// Pointers and size are multiples of 16.
LLMSCALE_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
LLMSCALE_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
LLMSCALE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but `pending` groups of stores have read their shared memory.
template <int pending>
LLMSCALE_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// Waits until all but `pending` groups of stores are complete.
template <int pending>
LLMSCALE_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}
#endif

}  // namespace llmscale
