// The matrix product that attention and the GEMMs share: C[rows, columns] += A[rows, k] B[k, columns].
//
// The k axis counts *units* of 32 bits: one float32, or two neighbouring bfloat16 where the chip multiplies
// those in pairs. A is row-major in units. B lies in panels of kPanel columns, [k units][kPanel] each, so
// that a vector holds neighbouring columns. C is float32, row-major.
#pragma once

#include <utility>

#include "src/cpu/convert.h"

namespace flashomni::cpu {
namespace FLASHOMNI_ISA {
namespace {

typedef uint32_t Unit;

/// float32 units: any input type, converted where it is packed.
struct FloatUnits {
  static constexpr int kElements = 1;  // matrix elements a unit
  static inline Float multiply_add(Float sum, const Unit* a, const Unit* b) {
    float x;
    std::memcpy(&x, a, 4);
    Float v;
    std::memcpy(&v, b, sizeof v);
    return sum + splat(x) * v;
  }
  template <class T>
  static inline void make(const T* in, int64_t n, Unit* out) {
    to_floats(in, reinterpret_cast<float*>(out), n);
  }
};

#if defined(__AVX512BF16__)
/// Pairs of bfloat16, multiplied and added in float32 by one instruction.
struct PairUnits {
  static constexpr int kElements = 2;
  static inline Float multiply_add(Float sum, const Unit* a, const Unit* b) {
    int32_t x;
    std::memcpy(&x, a, 4);
    return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x),
                                   (__m512bh)_mm512_loadu_si512(b));
  }
  static inline void make(const BFloat16* in, int64_t n, Unit* out) {
    if (n & 1) out[n / 2] = 0;
    std::memcpy(out, in, static_cast<size_t>(n) * 2);
  }
  static inline void make(const float* in, int64_t n, Unit* out) {
    if (n & 1) out[n / 2] = 0;
    from_floats(in, reinterpret_cast<BFloat16*>(out), n);
  }
};
template <class T>
struct UnitsOf {
  using type = FloatUnits;
};
template <>
struct UnitsOf<BFloat16> {
  using type = PairUnits;
};
#else
template <class T>
struct UnitsOf {
  using type = FloatUnits;
};
#endif

template <class Units>
constexpr int64_t units(int64_t elements) {
  return (elements + Units::kElements - 1) / Units::kElements;
}
inline int64_t padded(int64_t columns) {
  return (columns + kPanel - 1) / kPanel * kPanel;
}

template <class Units, int... kRow>
inline void micro_tile(std::integer_sequence<int, kRow...>, const Unit* a, int64_t a_stride, const Unit* b,
                       int64_t k, float* c, int64_t c_stride, bool accumulate) {
  // Folds, not loops: sums that a loop indexes would pass through memory on their way in and out.
  Float left[] = {(accumulate ? load(c + kRow * c_stride) : Float{})...};
  Float right[] = {(accumulate ? load(c + kRow * c_stride + kLanes) : Float{})...};
  for (int64_t i = 0; i < k; ++i, b += kPanel) {
    ((left[kRow] = Units::multiply_add(left[kRow], a + kRow * a_stride + i, b),
      right[kRow] = Units::multiply_add(right[kRow], a + kRow * a_stride + i, b + kLanes)),
     ...);
  }
  ((store(c + kRow * c_stride, left[kRow]), store(c + kRow * c_stride + kLanes, right[kRow])), ...);
}

/// A micro-tile of `rows` rows, at most kMost.
template <class Units, int kMost>
inline void micro_rows(int64_t rows, const Unit* a, int64_t a_stride, const Unit* b, int64_t k, float* c,
                       int64_t c_stride, bool accumulate) {
  if constexpr (kMost > 0) {
    if (rows == kMost) {
      micro_tile<Units>(std::make_integer_sequence<int, kMost>{}, a, a_stride, b, k, c, c_stride, accumulate);
    } else {
      micro_rows<Units, kMost - 1>(rows, a, a_stride, b, k, c, c_stride, accumulate);
    }
  }
}

/// C[rows, panels * kPanel] (+)= A B. `panel_stride`: units from one panel of B to the next.
template <class Units>
inline void multiply(const Unit* a, int64_t a_stride, int64_t rows, const Unit* b, int64_t panel_stride,
                     int64_t panels, int64_t k, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t p = 0; p < panels; ++p, b += panel_stride, c += kPanel) {
    int64_t height;
    for (int64_t r = 0; r < rows; r += height) {
      // The last two share what is left: a few rows alone have too few sums to hide an addition's latency.
      const int64_t left = rows - r;
      height = left <= kMicroRows ? left : left < 2 * kMicroRows ? (left + 1) / 2 : kMicroRows;
      micro_rows<Units, kMicroRows>(height, a + r * a_stride, a_stride, b, k, c + r * c_stride, c_stride,
                                    accumulate);
    }
  }
}

/// An 8x8 transpose of units: out[j * out_stride + i] = in[i][j].
inline void transpose8(const Unit* const in[8], Unit* out, int64_t out_stride) {
#if defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in[i]));
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out + i * out_stride),
                     _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(out + (i + 4) * out_stride),
                     _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) out[j * out_stride + i] = in[i][j];
  }
#endif
}

/// Packs `columns` rows of a row-major matrix as the *columns* of B (B = in^T): in[column][k], as keys and
/// weights lie. Columns up to the next multiple of kPanel become zero. `scratch` holds 8 * units(k) units.
template <class Units, class T>
inline void pack_transposed(const T* in, int64_t in_stride, int64_t columns, int64_t k, Unit* out,
                            int64_t panel_stride, Unit* scratch) {
  const int64_t k_units = units<Units>(k);
  for (int64_t column = 0; column < padded(columns); column += 8) {
    Unit* panel = out + column / kPanel * panel_stride + column % kPanel;
    const Unit* rows[8];
    for (int i = 0; i < 8; ++i) {
      const int64_t source = column + i;
      if (sizeof(T) == 4 && Units::kElements == 1 && source < columns) {
        rows[i] = reinterpret_cast<const Unit*>(in + source * in_stride);
        continue;
      }
      Unit* row = scratch + i * k_units;
      if (source < columns) {
        Units::make(in + source * in_stride, k, row);
      } else {
        std::memset(row, 0, static_cast<size_t>(k_units) * 4);
      }
      rows[i] = row;
    }
    int64_t j = 0;
    for (; j + 8 <= k_units; j += 8) {
      transpose8(rows, panel + j * kPanel, kPanel);
      for (auto& row : rows) row += 8;
    }
    for (; j < k_units; ++j) {
      for (int i = 0; i < 8; ++i) panel[j * kPanel + i] = *rows[i]++;
    }
  }
}

/// Packs a row-major matrix as B itself: in[k][column], as values lie. Columns up to the next multiple of
/// kPanel, and k up to a whole unit, become zero. `scratch` holds 2 * columns floats.
template <class T>
inline void pack_rows(FloatUnits, const T* in, int64_t in_stride, int64_t columns, int64_t k, Unit* out,
                      int64_t panel_stride, float*) {
  float* panels = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < k; ++i) {
    const T* row = in + i * in_stride;
    for (int64_t c = 0; c < columns; c += kPanel) {
      float* to = panels + c / kPanel * panel_stride + i * kPanel;
      if (c + kPanel <= columns) {
        store(to, load_as_float(row + c));
        store(to + kLanes, load_as_float(row + c + kLanes));
      } else {
        for (int64_t j = 0; j < kPanel; ++j) to[j] = c + j < columns ? to_float(row[c + j]) : 0.0f;
      }
    }
  }
}

#if defined(__AVX512BF16__)
template <class T>
inline void pack_rows(PairUnits, const T* in, int64_t in_stride, int64_t columns, int64_t k, Unit* out,
                      int64_t panel_stride, float* scratch) {
  BFloat16* even = reinterpret_cast<BFloat16*>(scratch);
  BFloat16* odd = even + columns;
  for (int64_t i = 0; i < k; i += 2) {
    PairUnits::make(in + i * in_stride, columns & ~int64_t{1}, reinterpret_cast<Unit*>(even));
    if (i + 1 < k) {
      PairUnits::make(in + (i + 1) * in_stride, columns & ~int64_t{1}, reinterpret_cast<Unit*>(odd));
    } else {
      std::memset(odd, 0, static_cast<size_t>(columns) * 2);
    }
    for (int64_t c = 0; c < padded(columns); c += kLanes) {
      Unit* to = out + c / kPanel * panel_stride + i / 2 * kPanel + c % kPanel;
      if (c + kLanes <= columns) {
        Half low, high;
        std::memcpy(&low, even + c, sizeof low);
        std::memcpy(&high, odd + c, sizeof high);
        const Int pair = __builtin_convertvector(low, Int) | __builtin_convertvector(high, Int) << 16;
        std::memcpy(to, &pair, sizeof pair);
      } else {
        for (int64_t j = 0; j < kLanes; ++j) {
          to[j] = c + j < columns ? Unit{even[c + j].bits} | Unit{odd[c + j].bits} << 16 : 0;
        }
      }
    }
  }
}
#endif

}  // namespace
}  // namespace FLASHOMNI_ISA
}  // namespace flashomni::cpu
