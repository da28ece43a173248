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

/// Folds the lanes of v into one: halves meet until one lane is left.
template <class Fold>
inline float fold_lanes(Float v, Fold&& fold) {
#if defined(__AVX512F__)
  v = fold(v, (Float)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4E));
  v = fold(v, (Float)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xB1));
  v = fold(v, (Float)_mm512_permute_ps((__m512)v, 0x4E));
  return fold(v, (Float)_mm512_permute_ps((__m512)v, 0xB1))[0];
#elif defined(__AVX2__)
  v = fold(v, (Float)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1));
  v = fold(v, (Float)_mm256_permute_ps((__m256)v, 0x4E));
  return fold(v, (Float)_mm256_permute_ps((__m256)v, 0xB1))[0];
#else
  v = fold(v, Float{v[2], v[3], v[0], v[1]});
  return fold(v, Float{v[1], v[0], v[3], v[2]})[0];
#endif
}
inline float largest(Float v) {
  return fold_lanes(v, maximum);
}
inline float total(Float v) {
  return fold_lanes(v, [](Float a, Float b) { return a + b; });
}

/// 2^x for x <= 128, relative error under 2e-7; 0 below -126 (and for -inf).
inline Float exp2_of(Float x) {
  const Float low = maximum(splat(-127.0f), x);  // in this order a NaN stays one
  const Float magic = splat(12582912.0f);        // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = low + magic;
  const Float f = low - (shifted - magic);  // in [-0.5, 0.5]
  Float p = splat(1.32647273e-3f);          // least relative error among polynomials that are 1 at 0
  p = p * f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
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
