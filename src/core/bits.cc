// Reading and packing runs of bits.
#include <bit>
#include <cstring>

#include "flashomni/error.h"
#include "flashomni/symbols.h"
#include "src/core/check.h"

namespace flashomni {
namespace {

static_assert(std::endian::native == std::endian::little, "packed bits are read as little-endian words");

/// Up to 64 bits from bit `at` on, none at or past `end`; *valid says how many. Touches no byte past the last
/// one.
uint64_t load_bits(const uint8_t* bytes, int64_t at, int64_t end, int64_t* valid) {
  const int64_t byte = at >> 3, shift = at & 7;
  const int64_t available = std::min<int64_t>(8, ceil_div(end, 8) - byte);
  uint64_t word = 0;
  std::memcpy(&word, bytes + byte, static_cast<size_t>(available));
  *valid = std::min<int64_t>(available * 8 - shift, end - at);
  word >>= shift;
  return *valid == 64 ? word : word & ((uint64_t{1} << *valid) - 1);
}

}  // namespace

int64_t BitRow::count() const {
  if (bytes_ == nullptr) return length_;
  const int64_t end = first_ + length_;
  int64_t total = 0, valid = 0;
  for (int64_t at = first_; at < end; at += valid) total += std::popcount(load_bits(bytes_, at, end, &valid));
  return total;
}

int64_t BitRow::next(int64_t i) const {
  if (i >= length_) return length_;
  if (bytes_ == nullptr) return i;
  const int64_t end = first_ + length_;
  int64_t valid = 0;
  for (int64_t at = first_ + i; at < end; at += valid) {
    const uint64_t word = load_bits(bytes_, at, end, &valid);
    if (word != 0) return at - first_ + std::countr_zero(word);
  }
  return length_;
}

void pack_bits(const uint8_t* values, int64_t count, BitOrder order, uint8_t* out) {
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t here = std::min<int64_t>(8, count - first);
    unsigned byte = 0;
    for (int64_t i = 0; i < here; ++i) {
      const unsigned bit = values[first + i] != 0;
      byte |= bit << (order == BitOrder::kLittle ? i : 7 - i);
    }
    out[first >> 3] = static_cast<uint8_t>(byte);
  }
}

void unpack_bits(const uint8_t* bytes, int64_t count, BitOrder order, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = (bytes[i >> 3] >> (order == BitOrder::kLittle ? i & 7 : 7 - (i & 7))) & 1;
  }
}

void segment_pack_bits(const TensorView& values, const TensorView& indptr, BitOrder order,
                       const TensorView& out, const TensorView& out_indptr) {
  const Device cpu;
  check::tensor(values, "values", DType::kUInt8, cpu, {check::kAny});
  check::indptr(indptr, "indptr", check::kAny, cpu, values.size(0), "values");
  const int64_t segments = indptr.size(0) - 1;
  const int32_t* ends = indptr.as<const int32_t>();
  int64_t bytes = 0;
  for (int64_t s = 0; s < segments; ++s) bytes += ceil_div(ends[s + 1] - ends[s], 8);
  check::output(out, "out", DType::kUInt8, cpu, {bytes});
  check::output(out_indptr, "out_indptr", DType::kInt32, cpu, {segments + 1});
  check::disjoint(out, "out", values, "values");
  check::disjoint(out, "out", indptr, "indptr");
  check::disjoint(out_indptr, "out_indptr", values, "values");
  check::disjoint(out_indptr, "out_indptr", indptr, "indptr");
  check::disjoint(out_indptr, "out_indptr", out, "out");

  int32_t* out_ends = out_indptr.as<int32_t>();
  out_ends[0] = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t length = ends[s + 1] - ends[s];
    pack_bits(values.as<const uint8_t>() + ends[s], length, order, out.as<uint8_t>() + out_ends[s]);
    out_ends[s + 1] = out_ends[s] + static_cast<int32_t>(ceil_div(length, 8));
  }
}

}  // namespace flashomni
