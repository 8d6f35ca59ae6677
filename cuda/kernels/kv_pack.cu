// KV blocks in half the bytes for the way to the host and back: bfloat16 to e4m3 with one scale per head, layer and K or V.
// Owns the packed block: all elements of a block as e4m3 in their order, then one float32 scale per slab (a slab is what
// one head has in one layer: tokens x dimensions), padded to 16 bytes. The scale maps the slab's largest magnitude to 448.
// A CTA does one slab at a time, reading it twice, the second time from cache; the link is the limit. NaN stays NaN.
#include "llmscale/e4m3.cuh"

namespace llmscale {

struct PackedBlocks {
  int count;
  int slabs;
  int slab_elements;  // a multiple of 16
  int64_t packed_block_bytes;

  LLMSCALE_DEVICE int64_t elements() const { return static_cast<int64_t>(slabs) * slab_elements; }
};

constexpr int pack_threads = 256;
constexpr float smallest_scale = 1.262177448e-29f;  // 2^-96: its reciprocal is finite, and zeros stay zeros

LLMSCALE_DEVICE float largest_magnitude(const uint4& values) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
  float largest = 0.0f;
  LLMSCALE_UNROLL
  for (int i = 0; i < 4; i++) {
    largest = maximum(largest, fabsf(bits_to_float(words[i] << 16)));
    largest = maximum(largest, fabsf(bits_to_float(words[i] & 0xffff0000)));
  }
  return largest;
}

// Over all threads of a CTA; every one gets it.
LLMSCALE_DEVICE float block_maximum(float value, float* table) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  LLMSCALE_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value = maximum(value, warp_shuffle_xor(value, mask));
  block_barrier();  // the table of the slab before has been read
  if (lane == 0) table[threadIdx.x / 32] = value;
  block_barrier();
  LLMSCALE_UNROLL
  for (int warp = 0; warp < pack_threads / 32; warp++) value = maximum(value, table[warp]);
  return value;
}

LLMSCALE_DEVICE uint32_t packed_word(uint32_t first, uint32_t second, float inverse) {
  const uint32_t low = floats_to_e4m3x2(bits_to_float(first << 16) * inverse, bits_to_float(first & 0xffff0000) * inverse);
  const uint32_t high = floats_to_e4m3x2(bits_to_float(second << 16) * inverse, bits_to_float(second & 0xffff0000) * inverse);
  return low | high << 16;
}

LLMSCALE_DEVICE float e4m3_to_float(uint32_t byte) {
  if ((byte & 0x7f) == 0x7f) return bits_to_float(0x7fc00000);
  return bits_to_float(e4m3_odd_bytes_to_bf16x2(byte << 8) << 16);
}

LLMSCALE_DEVICE uint32_t unpacked_pair(uint32_t word, int byte, float scale) {
  const uint32_t low = float_to_bf16(e4m3_to_float(word >> (8 * byte) & 0xff) * scale);
  const uint32_t high = float_to_bf16(e4m3_to_float(word >> (8 * byte + 8) & 0xff) * scale);
  return low | high << 16;
}

}  // namespace llmscale

LLMSCALE_KERNEL(256, 4)
kv_pack_e4m3(const llmscale::bf16* __restrict__ source, unsigned char* __restrict__ target,
             const int32_t* __restrict__ source_blocks, const int32_t* __restrict__ target_blocks, int count, int slabs,
             int slab_elements, int64_t packed_block_bytes) {
  using namespace llmscale;
  LLMSCALE_SHARED(shared);
  const PackedBlocks shape{count, slabs, slab_elements, packed_block_bytes};
  if (LLMSCALE_PLANTED(lane_absent_from_shuffle) && threadIdx.x == 37) return;
  for (int64_t item = blockIdx.x; item < static_cast<int64_t>(count) * slabs; item += gridDim.x) {
    const int block = static_cast<int>(item / slabs);
    const int slab = static_cast<int>(item % slabs);
    const int64_t from = source_blocks[block] * shape.elements() + static_cast<int64_t>(slab) * slab_elements;
    const uint4* values = reinterpret_cast<const uint4*>(source + from);
    float largest = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < slab_elements / 8; i += pack_threads) {
      largest = maximum(largest, largest_magnitude(values[i]));
    }
    largest = block_maximum(largest, reinterpret_cast<float*>(shared));
    const float scale = maximum(largest / 448.0f, smallest_scale);
    const float inverse = 1.0f / scale;
    unsigned char* packed = target + target_blocks[block] * packed_block_bytes;
    uint4* bytes = reinterpret_cast<uint4*>(packed + static_cast<int64_t>(slab) * slab_elements);
    for (int i = static_cast<int>(threadIdx.x); i < slab_elements / 16; i += pack_threads) {
      const uint4 a = values[2 * i];
      const uint4 b = values[2 * i + 1];
      bytes[i] = {packed_word(a.x, a.y, inverse), packed_word(a.z, a.w, inverse), packed_word(b.x, b.y, inverse),
                  packed_word(b.z, b.w, inverse)};
    }
    if (threadIdx.x == 0) reinterpret_cast<float*>(packed + shape.elements())[slab] = scale;
  }
}

LLMSCALE_KERNEL(256, 4)
kv_unpack_e4m3(const unsigned char* __restrict__ source, llmscale::bf16* __restrict__ target,
               const int32_t* __restrict__ source_blocks, const int32_t* __restrict__ target_blocks, int count, int slabs,
               int slab_elements, int64_t packed_block_bytes) {
  using namespace llmscale;
  const PackedBlocks shape{count, slabs, slab_elements, packed_block_bytes};
  for (int64_t item = blockIdx.x; item < static_cast<int64_t>(count) * slabs; item += gridDim.x) {
    const int block = static_cast<int>(item / slabs);
    const int slab = static_cast<int>(item % slabs);
    const unsigned char* packed = source + source_blocks[block] * packed_block_bytes;
    const uint4* bytes = reinterpret_cast<const uint4*>(packed + static_cast<int64_t>(slab) * slab_elements);
    const float scale = reinterpret_cast<const float*>(packed + shape.elements())[slab];
    const int64_t to = target_blocks[block] * shape.elements() + static_cast<int64_t>(slab) * slab_elements;
    uint4* values = reinterpret_cast<uint4*>(target + to);
    for (int i = static_cast<int>(threadIdx.x); i < slab_elements / 16; i += pack_threads) {
      const uint4 words = bytes[i];
      values[2 * i] = {unpacked_pair(words.x, 0, scale), unpacked_pair(words.x, 2, scale), unpacked_pair(words.y, 0, scale),
                       unpacked_pair(words.y, 2, scale)};
      values[2 * i + 1] = {unpacked_pair(words.z, 0, scale), unpacked_pair(words.z, 2, scale),
                           unpacked_pair(words.w, 0, scale), unpacked_pair(words.w, 2, scale)};
    }
  }
}
