// Symbols as kernels read them: packed bits, 32 at a time.
#pragma once

#include <cstdint>

#include "flashomni/tensor.h"

namespace flashomni::cuda {

inline constexpr int kBitsAWord = 32;

/// Ones in bits [0, count) of a word; count may be anything.
__device__ inline uint32_t low_bits(int count) {
  return count <= 0 ? 0 : count >= kBitsAWord ? ~0u : (1u << count) - 1;
}

/// Packed bits of all batch elements (see flashomni/symbols.h); a null pointer reads as all ones.
struct Bits {
  const uint8_t* bytes;
  const int32_t* indptr;  // byte offsets, or null: element b starts at b * stride
  int64_t stride, size;   // bytes

  /// Where bit `bit` of element b lies; there must be bytes.
  __device__ const uint8_t* byte(int b, int64_t bit) const {
    return bytes + (indptr != nullptr ? indptr[b] : b * stride) + (bit >> 3);
  }
  __device__ bool bit(int b, int64_t bit) const { return bytes == nullptr || (*byte(b, bit) >> (bit & 7) & 1); }
  /// Bits [bit, bit + 32) of element b. Bytes past the buffer read as 0.
  __device__ uint32_t word(int b, int64_t bit) const {
    if (bytes == nullptr) return ~0u;
    const uint8_t* at = byte(b, bit);
    const uint8_t* aligned = at - (reinterpret_cast<uintptr_t>(at) & 3);
    const uint8_t* end = bytes + size;
    const int shift = static_cast<int>(at - aligned) * 8 + static_cast<int>(bit & 7);
    if (aligned >= bytes && aligned + 8 <= end) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(aligned);
      return __funnelshift_r(words[0], words[1], shift);
    }
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i)
      if (aligned + i >= bytes && aligned + i < end) value |= uint64_t(aligned[i]) << (8 * i);
    return static_cast<uint32_t>(value >> shift);
  }
  /// Ones among bits [bit, bit + count) of element b.
  __device__ int ones(int b, int64_t bit, int count) const {
    if (bytes == nullptr) return count > 0 ? count : 0;
    const uint8_t* at = byte(b, bit);
    const uint8_t* aligned = at - (reinterpret_cast<uintptr_t>(at) & 3);
    const int shift = static_cast<int>(at - aligned) * 8 + static_cast<int>(bit & 7);
    const int words = (count + kBitsAWord - 1) / kBitsAWord;
    // Words that lie in the buffer, and the one after them too: without a test at each, reads do not wait for
    // one another.
    const int64_t whole = aligned < bytes ? 0 : (bytes + size - aligned) / 4 - 1;
    const int inside = static_cast<int>(whole < words ? whole : words);
    const uint32_t* from = reinterpret_cast<const uint32_t*>(aligned);
    int sum = 0;
#pragma unroll 8
    for (int w = 0; w < inside; ++w)
      sum += __popc(__funnelshift_r(from[w], from[w + 1], shift) & low_bits(count - kBitsAWord * w));
    for (int w = inside > 0 ? inside : 0; w < words; ++w)
      sum += __popc(word(b, bit + kBitsAWord * w) & low_bits(count - kBitsAWord * w));
    return sum;
  }
};

/// What a kernel reads of packed bits and, where present, their byte offsets.
inline Bits bits_of(const TensorView& bits, const TensorView& indptr) {
  if (!bits.present()) return {};
  const bool packed = indptr.present();
  const int64_t stride = packed ? 0 : bits.strides[0];
  const int64_t size = packed ? bits.size(0) : (bits.size(0) - 1) * stride + bits.size(1);
  return {bits.as<const uint8_t>(), packed ? indptr.as<const int32_t>() : nullptr, stride, size};
}

}  // namespace flashomni::cuda
