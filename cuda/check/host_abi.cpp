// The kernels as a CPU library with one function, the emulation's cuLaunchKernel: the same kernel names and the same
// array of pointers to argument values as the driver takes, so that one launcher serves both. Owns the table of kernels.
// Answers with a message where the emulation found something; one launch at a time.
#include <cstring>
#include <utility>

#include "kernels/kv_copy.cu"
#include "kernels/kv_pack.cu"
#include "kernels/w4_panel.cu"
#include "kernels/w4a16_matmul.cu"
#include "kernels/w8_panel.cu"
#include "kernels/w8a16_matmul.cu"

namespace {

template <class... Arguments, size_t... indices>
void call_with(void (*kernel)(Arguments...), void** values, std::index_sequence<indices...>) {
  kernel(*static_cast<Arguments*>(values[indices])...);
}

template <auto kernel>
struct Entry;

template <class... Arguments, void (*kernel)(Arguments...)>
struct Entry<kernel> {
  static constexpr unsigned arguments = sizeof...(Arguments);
  static void call(void** values) { call_with(kernel, values, std::index_sequence_for<Arguments...>()); }
};

struct Kernel {
  const char* name;
  unsigned arguments;
  void (*call)(void** values);
  int shared_bytes;
};

#define KERNEL(name, shared_bytes) \
  { #name, Entry<&name>::arguments, &Entry<&name>::call, shared_bytes }

using llmscale::W4a16;
using llmscale::W8a16;

const Kernel kernels[] = {
    KERNEL(kv_copy_bulk, llmscale::CopyRing::shared_bytes),
    KERNEL(kv_copy_loads, 0),
    KERNEL(kv_pack_e4m3, llmscale::pack_threads / 32 * 4),
    KERNEL(kv_unpack_e4m3, 0),
    KERNEL(w4_panel, llmscale::PanelShape::shared_bytes),
    KERNEL(w8_panel, llmscale::PanelShape::shared_bytes),
    KERNEL(w4a16_matmul_8_rows, (W4a16<1, 1>::shared_bytes)),
    KERNEL(w4a16_matmul_16_rows, (W4a16<2, 1>::shared_bytes)),
    KERNEL(w4a16_matmul_32_rows, (W4a16<4, 1>::shared_bytes)),
    KERNEL(w4a16_matmul_64_rows, (W4a16<8, 1>::shared_bytes)),
    KERNEL(w4a16_matmul_8_rows_group_32, (W4a16<1, 2>::shared_bytes)),
    KERNEL(w4a16_matmul_16_rows_group_32, (W4a16<2, 2>::shared_bytes)),
    KERNEL(w4a16_matmul_32_rows_group_32, (W4a16<4, 2>::shared_bytes)),
    KERNEL(w4a16_matmul_64_rows_group_32, (W4a16<8, 2>::shared_bytes)),
    KERNEL(w8a16_matmul_8_rows, W8a16<1>::shared_bytes),
    KERNEL(w8a16_matmul_16_rows, W8a16<2>::shared_bytes),
    KERNEL(w8a16_matmul_32_rows, W8a16<4>::shared_bytes),
    KERNEL(w8a16_matmul_64_rows, W8a16<8>::shared_bytes),
};

const Kernel* find(const char* name) {
  for (const Kernel& kernel : kernels) {
    if (strcmp(kernel.name, name) == 0) return &kernel;
  }
  return nullptr;
}

}  // namespace

// Name of kernel `index`, null behind the last.
extern "C" const char* check_kernel_name(unsigned index) {
  return index < sizeof kernels / sizeof *kernels ? kernels[index].name : nullptr;
}

// What the kernel's source needs; the launcher states the same number.
extern "C" int check_shared_bytes(const char* name) { return find(name)->shared_bytes; }

extern "C" void check_plant(int bug) { check::planted_bug() = static_cast<check::PlantedBug>(bug); }

// 0, or 1 with what went wrong in `message`.
extern "C" int check_launch(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, unsigned seed,
                            void** values, unsigned count, char* message, size_t message_bytes) {
  std::string failure;
  const Kernel* kernel = find(name);
  if (kernel == nullptr) {
    failure = std::string("there is no kernel ") + name;
  } else if (kernel->arguments != count) {
    failure = std::string(name) + " takes " + std::to_string(kernel->arguments) + " arguments, not " + std::to_string(count);
  } else {
    failure = check::machine().launch({grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared_bytes, seed,
                                      [=] { kernel->call(values); });
  }
  snprintf(message, message_bytes, "%s", failure.c_str());
  return failure.empty() ? 0 : 1;
}
