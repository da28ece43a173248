// Sparse symbols: the one currency between policies and kernels.
//
// 1 = compute, 0 = reuse (S_c) or skip (S_s). Packed little-endian, 8 to a byte; each batch element starts on
// a byte.
//   S_c ("cache"), bit index in a batch element:  q_block * heads + head
//   S_s ("skip"),  bit index in a batch element: (q_block * heads + head) * kv_blocks + kv_block
#pragma once

#include <cstdint>

#include "flashomni/export.h"
#include "flashomni/tensor.h"

namespace flashomni {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// Packed bits as a kernel receives them. Both absent: everything is computed.
struct Symbols {
  TensorView cache;  ///< uint8: [batch, bytes] without indptr, [total bytes] with; absent: all tiles compute
  TensorView skip;   ///< uint8, likewise; absent: no block is skipped
  TensorView cache_indptr;  ///< int32 [batch + 1], byte offsets; absent: equal elements
  TensorView skip_indptr;   ///< int32 [batch + 1]
  int32_t block_q = 128;    ///< tokens a query block
  int32_t block_kv = 128;   ///< tokens a key/value block
};

/// What the bits of one batch element describe.
struct SymbolGeometry {
  int64_t q_tokens = 0, kv_tokens = 0, heads = 0;
  int32_t block_q = 128, block_kv = 128;

  int64_t q_blocks() const { return ceil_div(q_tokens, block_q); }
  int64_t kv_blocks() const { return ceil_div(kv_tokens, block_kv); }
  int64_t cache_bits() const { return q_blocks() * heads; }
  int64_t skip_bits() const { return cache_bits() * kv_blocks(); }
  int64_t cache_bytes() const { return ceil_div(cache_bits(), 8); }
  int64_t skip_bytes() const { return ceil_div(skip_bits(), 8); }
};

/// Reads a run of packed bits. A null pointer reads as all ones, as an absent symbol does.
class FLASHOMNI_API BitRow {
 public:
  BitRow(const uint8_t* bytes, int64_t first, int64_t length)
      : bytes_(bytes), first_(first), length_(length) {}
  int64_t length() const { return length_; }
  bool operator[](int64_t i) const {
    if (bytes_ == nullptr) return true;
    const int64_t bit = first_ + i;
    return (bytes_[bit >> 3] >> (bit & 7)) & 1;
  }
  int64_t count() const;
  /// The first set bit at or after i, or length().
  int64_t next(int64_t i) const;

 private:
  const uint8_t* bytes_;
  int64_t first_, length_;
};

/// Sets or clears one little-endian bit.
inline void write_bit(uint8_t* bytes, int64_t bit, bool value) {
  const uint8_t mask = static_cast<uint8_t>(1u << (bit & 7));
  bytes[bit >> 3] = static_cast<uint8_t>(value ? bytes[bit >> 3] | mask : bytes[bit >> 3] & ~mask);
}

enum class BitOrder : int32_t { kLittle, kBig };

/// Packs one segment of 0/1 bytes as numpy.packbits does; writes ceil(count / 8) bytes, the padding bits 0.
FLASHOMNI_API void pack_bits(const uint8_t* values, int64_t count, BitOrder order, uint8_t* out);
/// The inverse; writes count bytes of 0 or 1.
FLASHOMNI_API void unpack_bits(const uint8_t* bytes, int64_t count, BitOrder order, uint8_t* out);

/// Packs segments, each to whole bytes. `values` uint8 [total]; `indptr` int32 [n + 1] in values; `out` uint8
/// [sum of ceil(length / 8)]; `out_indptr` int32 [n + 1], in bytes. CPU.
FLASHOMNI_API void segment_pack_bits(const TensorView& values, const TensorView& indptr, BitOrder order,
                                     const TensorView& out, const TensorView& out_indptr);

/// Skip bits of every batch element as ascending block lists, the layout of cuDNN's and FlashAttention-4's
/// block sparsity: `indices` int32 [batch, heads, q_blocks, capacity], `counts` int32 [batch, heads,
/// q_blocks]. Rows of cached tiles have count 0; indices past a count are 0. ValueError where a row needs
/// more than `capacity`. CPU.
FLASHOMNI_API void to_block_lists(const Symbols& symbols, const SymbolGeometry& geometry, int64_t batch,
                                  const TensorView& indices, const TensorView& counts);
/// The inverse: writes `symbols.skip` (all bits), and `symbols.cache` where present (a row with count 0 is
/// cached). Lists may be in any order. CPU.
FLASHOMNI_API void from_block_lists(const TensorView& indices, const TensorView& counts,
                                    const SymbolGeometry& geometry, const Symbols& symbols);

/// The first byte of a batch element's bits; null where the symbol is absent.
FLASHOMNI_API const uint8_t* element_bytes(const TensorView& bits, const TensorView& indptr,
                                           int64_t batch_index);

/// Throws unless `bits` (+ `indptr`) holds `batch` elements; element b needs bytes_needed(b) bytes. `name` is
/// the argument's name. Reads indptr, so CPU tensors only; CUDA backends check shapes alone.
FLASHOMNI_API void check_bits(const TensorView& bits, const TensorView& indptr, int64_t batch,
                              const int64_t* bytes_needed, const char* name);

}  // namespace flashomni
