// What a kernel file sees of its compiler: nvcc, NVRTC, or a host C++ compiler with the emulation in check/.
// Owns the fixed-width types, the macros that declare kernels and device functions, and the choice of the file behind
// every instruction. It needs no CUDA header and no standard header on a device, so that NVRTC compiles the kernels with
// torch's wheels alone. It knows no kernel.
#pragma once

#if defined(__CUDACC__)

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#define LLMSCALE_DEVICE __device__ __forceinline__
#define LLMSCALE_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// All shared memory of a kernel is dynamic and the launcher states its size: the emulation allocates exactly as much,
// poisons it, and a sanitizer sees the byte behind its end.
#define LLMSCALE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define LLMSCALE_UNROLL _Pragma("unroll")
#define LLMSCALE_NO_UNROLL _Pragma("unroll 1")
// Bugs that tests plant exist in the emulation only.
#define LLMSCALE_PLANTED(bug) false

#else

#include "check/emulation.h"

#define LLMSCALE_DEVICE inline
#define LLMSCALE_KERNEL(threads, blocks) extern "C" void
#define LLMSCALE_SHARED(name) unsigned char* name = check::machine().shared()
#define LLMSCALE_UNROLL
#define LLMSCALE_NO_UNROLL
#define LLMSCALE_PLANTED(bug) (check::planted_bug() == check::PlantedBug::bug)
#define __restrict__ __restrict

#endif

namespace llmscale {

// A bfloat16 is its bits; arithmetic on pairs of them is in instructions.cuh.
typedef uint16_t bf16;

LLMSCALE_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

LLMSCALE_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LLMSCALE_DEVICE float bf16_to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

}  // namespace llmscale

#if defined(__CUDACC__)
#include "llmscale/instructions_device.cuh"
#else
#include "check/instructions.h"
#endif
