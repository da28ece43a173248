// float32 vectors of the compiler's own kind, at the width that this build's instruction set has. One source
// serves every instruction set; everything is static, so that no build's code can stand in for another's at
// link time.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace flashomni::cpu {
namespace FLASHOMNI_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMicroRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kMicroRows = 6;
#else
constexpr int kLanes = 4, kMicroRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of one packed panel: two vectors

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));

inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Float v) {
  std::memcpy(p, &v, sizeof v);
}
inline Float splat(float x) {
  return x - Float{};
}

inline Float maximum(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline float largest(Float v) {
  float x = v[0];
  for (int i = 1; i < kLanes; ++i) x = v[i] > x ? v[i] : x;
  return x;
}
inline float total(Float v) {
  float x = v[0];
  for (int i = 1; i < kLanes; ++i) x += v[i];
  return x;
}

/// 2^x for x <= 128, relative error under 2e-7; 0 below -126 (and for -inf).
inline Float exp2_of(Float x) {
  const Float low = maximum(splat(-127.0f), x);  // in this order a NaN stays one
  const Float magic = splat(12582912.0f);        // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = low + magic;
  const Float f = low - (shifted - magic);  // in [-0.5, 0.5]
  Float p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  Int exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4B400000 + 127) << 23;  // -127 gives a zero exponent field: the result is 0
  Float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

}  // namespace
}  // namespace FLASHOMNI_ISA
}  // namespace flashomni::cpu
