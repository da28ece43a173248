// What differences and forecasts share, of plain tensors and of quantised ones.
#pragma once

#include <algorithm>
#include <bit>

#include "flashomni/forecast.h"
#include "src/cuda/common/bits.cuh"
#include "src/cuda/common/half_run.cuh"

namespace flashomni::cuda {

inline constexpr int kTaylorThreads = 256;
inline constexpr int kMostOrders = kMaxOrder + 1;

/// Of a forecast of some rows: the most rows of a thread, and how many CTAs there should be before a thread takes more
/// than one. An H100 holds some 800 at a time.
inline constexpr int kMostRows = 8, kManyCtas = 2048;

/// A tensor as rows of its last dimension.
struct Rows {
  void* data;
  int64_t strides[3];  // of the leading dimensions, the last one first
};

/// How threads are spread over rows: so many a row, each at the same columns of rows `sizes[0]` apart.
struct RowThreads {
  uint32_t rows;  // that have threads of their own
  uint32_t a_row;
  uint32_t sizes[2];  // of the leading dimensions, the last one first; the third follows from them
  uint32_t end;       // of the last leading dimension

  /// Lets threads take several rows of the last leading dimension, where enough CTAs remain: of one row a thread, a
  /// CTA that is left out costs nearly half a full one, and a full one waits for its bit before it reads.
  void share() {
    const int64_t each = std::clamp<int64_t>(ceil_div(ctas(), kManyCtas), 1, kMostRows);
    const uint32_t apart = static_cast<uint32_t>(ceil_div(int64_t(end), each));
    rows = rows / sizes[0] * apart, sizes[0] = apart;
  }
  int64_t ctas() const { return ceil_div(int64_t(rows) * a_row, kTaylorThreads); }
  dim3 grid() const { return dim3(static_cast<unsigned>(ctas())); }
};

/// A thread's first row by number, and which of the row's threads it is. In 32 bits: divisions of 64 took longer than
/// the memory.
struct RowPlace {
  uint32_t index[3], lane;
  bool exists;

  __device__ explicit RowPlace(const RowThreads& threads) {
    const uint32_t thread = blockIdx.x * kTaylorThreads + threadIdx.x;
    const uint32_t row = thread / threads.a_row, rest = row / threads.sizes[0];
    lane = thread - row * threads.a_row;
    exists = row < threads.rows;
    index[0] = row - rest * threads.sizes[0];
    index[2] = rest / threads.sizes[1];
    index[1] = rest - index[2] * threads.sizes[1];
  }
  /// The row `later` rows of the last leading dimension after the first.
  template <class Element>
  __device__ Element* row_of(const Rows& rows, uint32_t later = 0) const {
    return static_cast<Element*>(rows.data) + (index[0] + later) * rows.strides[0] + index[1] * rows.strides[1] +
           index[2] * rows.strides[2];
  }
};

/// Which rows of [B, M, N] a forecast is for. Launches do not depend on it.
struct ForecastRowBits {
  bool some = false;    // else all of them, one a thread
  bool active = false;  // those whose bit is 1, else 0
  Bits bits{};
  int64_t first_block = 0;   // the row block that row 0 lies in
  uint32_t first_row = 0;    // where in it
  uint32_t block_shift = 0;  // 2^block_shift rows a row block

  explicit ForecastRowBits(const TaylorForecastArguments& a) {
    if (a.rows == ForecastRows::kAll) return;
    some = true, active = a.rows == ForecastRows::kActive;
    bits = bits_of(a.tiles.cache, a.tiles.cache_indptr);
    first_block = a.tiles.row_offset / a.tiles.block_q;
    first_row = static_cast<uint32_t>(a.tiles.row_offset % a.tiles.block_q);
    block_shift = static_cast<uint32_t>(std::countr_zero(static_cast<uint32_t>(a.tiles.block_q)));
  }

  /// A one for each of the thread's rows that is forecast, from the first one on. All bits are asked for at once.
  __device__ uint32_t wanted(const RowPlace& place, const RowThreads& threads) const {
    if (!some) return 1;
    const int element = static_cast<int>(place.index[1]);
    const uint8_t* bytes = bits.bytes != nullptr ? bits.byte(element, 0) : nullptr;
    uint32_t found[kMostRows];
#pragma unroll
    for (int i = 0; i < kMostRows; ++i) {
      const uint32_t row = min(place.index[0] + i * threads.sizes[0], threads.end - 1);
      const int64_t block = first_block + ((first_row + row) >> block_shift);
      found[i] = bytes != nullptr ? bytes[block >> 3] >> (block & 7) & 1 : 1;
    }
    uint32_t ones = 0;
#pragma unroll
    for (int i = 0; i < kMostRows; ++i)
      if (found[i] == uint32_t(active) && place.index[0] + i * threads.sizes[0] < threads.end) ones |= 1u << i;
    return ones;
  }
};

/// Calls f with the distance to each of the thread's rows that is forecast.
template <class F>
__device__ inline void for_wanted_rows(const ForecastRowBits& rows, const RowPlace& place, const RowThreads& threads,
                                       F&& f) {
  for (uint32_t left = rows.wanted(place, threads); left != 0; left &= left - 1)
    f((__ffs(static_cast<int>(left)) - 1) * threads.sizes[0]);
}

/// As load_run, of a run that a row's end may cut short to `count` elements, none if it is not positive. In whole
/// words: as elements the compiler would take them apart where they are loaded, and each load would wait for the one
/// before.
template <class Element>
__device__ inline HalfRun<Element> load_run(const Element* from, int count, bool aligned) {
  alignas(16) uint32_t word[kRun / 2] = {};
  if (count == kRun && aligned) {
    reinterpret_cast<uint4&>(word) = *reinterpret_cast<const uint4*>(from);
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (i < count) word[i / 2] |= uint32_t(bits[i]) << (i % 2 * 16);
  }
  HalfRun<Element> run;
  reinterpret_cast<uint4&>(run) = reinterpret_cast<const uint4&>(word);
  return run;
}
template <class Element>
__device__ inline void store_run(Element* to, const HalfRun<Element>& run, int count, bool aligned) {
  if (count == kRun) return store_run(to, run, aligned);
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (i < count) to[i] = run.element[i];
}

/// Calls f with the element type and the number of orders as constants.
template <class F>
void with_taylor_kernel(DType dtype, const char* argument, int orders, F&& f) {
  with_half_type(dtype, argument, [&](auto* type) {
    if (orders == 1) return f(type, std::integral_constant<int, 1>());
    if (orders == 2) return f(type, std::integral_constant<int, 2>());
    if (orders == 3) return f(type, std::integral_constant<int, 3>());
    f(type, std::integral_constant<int, kMostOrders>());
  });
}

/// The same for differences, with whether there is a last one that is not kept.
template <class F>
void with_update_kernel(const TaylorUpdateArguments& a, F&& f) {
  with_taylor_kernel(a.feature.dtype, "feature", a.orders, [&](auto* type, auto orders) {
    if (a.last.present()) return f(type, orders, std::true_type());
    f(type, orders, std::false_type());
  });
}

}  // namespace flashomni::cuda
