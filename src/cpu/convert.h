// bfloat16 and float16 to float32 and back, a run of elements at a time, rounding to nearest even.
#pragma once

#include "flashomni/tensor.h"
#include "src/cpu/vector.h"

namespace flashomni::cpu {
namespace FLASHOMNI_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) {
  return x;
}
inline float to_float(BFloat16 x) {
  return bits_to_float(uint32_t{x.bits} << 16);
}
inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Multiplying by 2^112 moves the exponent's bias over and makes subnormals normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000)));
}

inline void from_float(float x, float& out) {
  out = x;
}
inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = float_to_bits(x);
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  out.bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Float16& out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00;
  } else if (magnitude >= 0x477FF000) {
    half = 0x7C00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 lines the last bit up, and rounds.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000;
  } else {
    half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}

#if defined(__AVX512F__)
inline Float load_as_float(const Float16* p) {
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_from_float(Float16* p, Float v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline Float load_as_float(const Float16* p) {
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_from_float(Float16* p, Float v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Float load_as_float(const Float16* p) {
  Float v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void store_from_float(Float16* p, Float v) {
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p[i]);
}
#endif

inline Float load_as_float(const float* p) {
  return load(p);
}
inline void store_from_float(float* p, Float v) {
  store(p, v);
}

inline Float load_as_float(const BFloat16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  const Int wide = __builtin_convertvector(h, Int) << 16;
  Float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
inline void store_from_float(BFloat16* p, Float v) {
  typedef uint32_t Word __attribute__((vector_size(kLanes * 4)));
  Word bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Word rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const Word nan = (Word)((bits & 0x7FFFFFFF) > 0x7F800000);
  const Half h = __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 0x40) & nan), Half);
  std::memcpy(p, &h, sizeof h);
}

template <class T>
inline void to_floats(const T* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_as_float(in + i));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
template <class T>
inline void from_floats(const float* in, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_from_float(out + i, load(in + i));
  for (; i < n; ++i) from_float(in[i], out[i]);
}

/// One sign, four bits of exponent, three of mantissa; no infinity: what is too large becomes 448.
struct E4M3 {
  uint8_t bits;
};
inline float to_float(E4M3 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24, magnitude = x.bits & 0x7F;
  if (magnitude == 0x7F) return bits_to_float(0x7FC00000);
  // Multiplying by 2^120 moves the exponent's bias over and makes subnormals normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 20) * bits_to_float(0x7B800000)));
}
inline void from_float(float x, E4M3& out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7FFFFFFF;
  // Below 2^-6, adding 2^14 lines the last bit up, and rounds.
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000;
  uint32_t large = (magnitude - 0x3C000000 + 0x7FFFF + (magnitude >> 20 & 1)) >> 20;
  large = large > 0x7E ? 0x7E : large;
  const uint32_t rounded = magnitude < 0x3C800000 ? small : large;
  out.bits = uint8_t(sign | (magnitude > 0x7F800000 ? 0x7F : rounded));
}

/// Calls f with a null pointer of the element type that `dtype` stands for.
template <class F>
inline void with_type(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (dtype == DType::kFloat16) {
    f(static_cast<Float16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

}  // namespace
}  // namespace FLASHOMNI_ISA
}  // namespace flashomni::cpu
