// One launch from a file, for builds with sanitizers: buffers are allocated with exactly their size, so that the first
// byte behind one is reported, with the kernel's line. Reads a case from standard input and writes the buffers to
// standard output; the format is that of tests/cuda/emulator.py. Ends with 1 where the emulation found something.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" int check_launch(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, unsigned seed,
                            void** values, unsigned count, char* message, size_t message_bytes);
extern "C" void check_plant(int bug);

namespace {

void read_exactly(void* to, size_t bytes) {
  if (bytes > 0 && fread(to, bytes, 1, stdin) != 1) {
    fprintf(stderr, "the case ends early\n");
    exit(2);
  }
}

uint32_t read_word() {
  uint32_t word = 0;
  read_exactly(&word, sizeof word);
  return word;
}

}  // namespace

int main() {
  std::string name(read_word(), '\0');
  read_exactly(name.data(), name.size());
  unsigned grid[3];
  for (unsigned& extent : grid) extent = read_word();
  const unsigned threads = read_word();
  const unsigned shared_bytes = read_word();
  const unsigned seed = read_word();
  check_plant(static_cast<int>(read_word()));
  const uint32_t count = read_word();
  std::vector<uint64_t> words(count);
  std::vector<void*> buffers(count, nullptr);
  std::vector<uint32_t> sizes(count, 0);
  std::vector<void*> values(count);
  for (uint32_t i = 0; i < count; i++) {
    const bool is_buffer = read_word() == 1;
    sizes[i] = is_buffer ? read_word() : 0;
    values[i] = &words[i];
    if (is_buffer) {
      buffers[i] = malloc(sizes[i]);  // aligned to 16 bytes, as the kernels ask for
      read_exactly(buffers[i], sizes[i]);
      words[i] = reinterpret_cast<uint64_t>(buffers[i]);
    } else {
      read_exactly(&words[i], sizeof words[i]);
    }
  }
  char message[512];
  if (check_launch(name.c_str(), grid, threads, shared_bytes, seed, values.data(), count, message, sizeof message) != 0) {
    fprintf(stderr, "%s\n", message);
    return 1;
  }
  for (uint32_t i = 0; i < count; i++) {
    if (buffers[i] != nullptr) fwrite(buffers[i], 1, sizes[i], stdout);
    free(buffers[i]);
  }
  return 0;
}
