// Cuts the caller's workspace into 64-byte aligned pieces; the same walk with a null base measures it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashomni::cpu {
namespace FLASHOMNI_ISA {
namespace {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

inline int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/// One bit of a batch element; a null pointer reads as all ones.
inline bool bit_at(const uint8_t* bytes, int64_t bit) {
  return bytes == nullptr || (bytes[bit >> 3] >> (bit & 7) & 1);
}

}  // namespace
}  // namespace FLASHOMNI_ISA
}  // namespace flashomni::cpu
