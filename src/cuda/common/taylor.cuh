// What differences and forecasts share, of plain tensors and of quantised ones.
#pragma once

#include "flashomni/forecast.h"
#include "src/cuda/common/bits.cuh"
#include "src/cuda/common/half_run.cuh"

namespace flashomni::cuda {

inline constexpr int kTaylorThreads = 256;
inline constexpr int kMostOrders = kMaxOrder + 1;

/// A tensor as rows of its last dimension.
struct Rows {
  void* data;
  int64_t strides[3];  // of the leading dimensions, the last one first
};

/// Which rows of [B, M, N] a forecast is for. Launches do not depend on it: a thread whose row is not among them
/// ends before it reads.
struct ForecastRowBits {
  bool some = false;    // else all of them
  bool active = false;  // those whose bit is 1, else 0
  Bits bits{};
  int64_t first_block = 0;  // the row block that row 0 lies in
  uint32_t first_row = 0;   // where in it
  uint32_t block = 1;       // rows a row block

  explicit ForecastRowBits(const TaylorForecastArguments& a) {
    if (a.rows == ForecastRows::kAll) return;
    some = true, active = a.rows == ForecastRows::kActive;
    bits = bits_of(a.tiles.cache, a.tiles.cache_indptr);
    first_block = a.tiles.row_offset / a.tiles.block_q;
    first_row = static_cast<uint32_t>(a.tiles.row_offset % a.tiles.block_q);
    block = static_cast<uint32_t>(a.tiles.block_q);
  }

  __device__ bool has(uint32_t element, uint32_t row) const {
    return !some || bits.bit(static_cast<int>(element), first_block + (first_row + row) / block) == active;
  }
};

/// As load_run, of a run that a row's end may cut short to `count` elements, none if it is not positive.
template <class Element>
__device__ inline HalfRun<Element> load_run(const Element* from, int count, bool aligned) {
  if (count == kRun) return load_run(from, aligned);
  HalfRun<Element> run{};
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (i < count) run.element[i] = from[i];
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

}  // namespace flashomni::cuda
