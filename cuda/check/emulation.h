// What a kernel's source needs of CUDA when a host compiler reads it: vector types, built-in variables, planted bugs.
// Owns nothing but names; the machine behind them is machine.h, the instructions are in instructions.h. A planted bug
// is a known mistake that a test switches on, to see that the emulation finds it; it does not exist on a device.
#pragma once

#include <math.h>
#include <cstdint>
#include <cstring>

#include "check/machine.h"

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

#define threadIdx (check::machine().thread().index)
#define blockIdx (check::machine().block_index())
#define blockDim (check::machine().block())
#define gridDim (check::machine().grid())

namespace check {

enum class PlantedBug : int {
  none = 0,
  no_barrier_before_reuse = 1,    // shared memory is reused while slower warps still read it
  no_wait_for_copy = 2,           // a stage is read before its copies have landed
  no_wait_for_store = 3,          // a stage is overwritten while a bulk store still reads it
  lane_absent_from_shuffle = 4,   // one lane leaves before the others exchange
  row_past_the_end = 5,           // one row more is read than there is
};

inline PlantedBug& planted_bug() {
  static PlantedBug bug = PlantedBug::none;
  return bug;
}

}  // namespace check
