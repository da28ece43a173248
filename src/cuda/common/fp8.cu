// To e4m3 with a scale for every 128 columns of a row, and differences and forecasts of what is kept so. Eight lanes
// hold 128 columns, so a scale is one reduction among neighbours. A lane has two runs of eight columns, 64 columns
// apart: as many bytes under way as of one run of 16, but lanes side by side read and write whole sectors of either
// type (of 16-bit floats, a run of 16 would be moved in halves of sectors).
#include <cuda_fp8.h>

#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/launch.h"
#include "src/cuda/common/taylor.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kRuns = 2;  // of a thread
constexpr int kLanesAScale = kScaleColumns / (kRun * kRuns);
constexpr float kLargest = 448, kNothing = 0x1p-100f;

/// Eight numbers, four a word: as halves of words the compiler would take them apart where they are loaded, and each
/// load would wait for the one before.
struct alignas(8) Fp8Run {
  uint32_t word[kRun / 4];
};

struct Fp8Problem {
  Rows values[kMostOrders], scales[kMostOrders], plain, last;  // plain: x, the feature, or the forecast
  const float* coefficients;
  int64_t coefficient_stride, width;
  RowThreads threads;  // a multiple of kLanesAScale a row: groups of lanes do not cross rows
  bool plain_aligned, values_aligned;
  int valid;
  float per_step;
};

/// Where a thread's columns lie.
struct Place : RowPlace {
  int64_t column;  // of the first run
  int remaining;   // columns from there on, up to the end of the scale's; 0 or less past the end of the row

  __device__ explicit Place(const Fp8Problem& p) : RowPlace(p.threads) {
    column = int64_t(lane / kLanesAScale) * kScaleColumns + lane % kLanesAScale * kRun;
    remaining = static_cast<int>(exists ? min(kScaleColumns, p.width - column) : 0);
  }
  static constexpr int kApart = kLanesAScale * kRun;  // columns, from a run to the next one
  /// Columns of a run; 0 or less past the end of a row.
  __device__ int count(int run) const { return min(kRun, remaining - run * kApart); }
  template <class Element>
  __device__ Element* in(const Rows& rows, int run, uint32_t later = 0) const {
    return row_of<Element>(rows, later) + column + run * kApart;
  }
  __device__ float* scale_of(const Rows& rows, uint32_t later = 0) const {
    return row_of<float>(rows, later) + lane / kLanesAScale;
  }
};

__device__ inline uint32_t to_fp8(float x, float y) {
  return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, __NV_E4M3);
}
__device__ inline Fp8Run to_fp8(const float (&x)[kRun], float inverse) {
  Fp8Run run;
#pragma unroll
  for (int i = 0; i < kRun; i += 4)
    run.word[i / 4] = to_fp8(x[i] * inverse, x[i + 1] * inverse) | to_fp8(x[i + 2] * inverse, x[i + 3] * inverse) << 16;
  return run;
}
__device__ inline void from_fp8(const Fp8Run& run, float (&x)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i += 2) {
    const auto bits = static_cast<__nv_fp8x2_storage_t>(run.word[i / 4] >> (i % 4 * 8));
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(bits, __NV_E4M3)));
    x[i] = pair.x, x[i + 1] = pair.y;
  }
}

/// What a thread has of a quantised tensor.
struct Fp8Runs {
  Fp8Run run[kRuns];
  float scale;  // of its group of lanes
};

/// All lanes of the warp take part; columns past the end of a row are 0.
__device__ inline Fp8Runs quantise(const float (&x)[kRuns][kRun]) {
  float most = 0;
#pragma unroll
  for (int r = 0; r < kRuns; ++r)
#pragma unroll
    for (int e = 0; e < kRun; ++e) most = fmaxf(most, fabsf(x[r][e]));  // passes over a NaN
#pragma unroll
  for (int distance = kLanesAScale / 2; distance > 0; distance /= 2)
    most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
  if (most < kNothing) most = 0;
  const float inverse = most > 0 ? kLargest / most : 0.0f;
  Fp8Runs runs;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) runs.run[r] = to_fp8(x[r], inverse);
  runs.scale = most / kLargest;
  return runs;
}

__device__ inline void store(const Fp8Runs& runs, const Fp8Problem& p, int order, const Place& place) {
  if (place.remaining <= 0) return;
  if (place.lane % kLanesAScale == 0) *place.scale_of(p.scales[order]) = runs.scale;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    uint8_t* to = place.in<uint8_t>(p.values[order], r);
    const int count = place.count(r);
    if (count == kRun && p.values_aligned) {
      *reinterpret_cast<Fp8Run*>(to) = runs.run[r];
    } else {
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        if (e < count) to[e] = static_cast<uint8_t>(runs.run[r].word[e / 4] >> (e % 4 * 8));
    }
  }
}

/// The run at `from`, of which `count` columns exist.
__device__ inline Fp8Run load_fp8(const uint8_t* from, int count, bool aligned) {
  if (count == kRun && aligned) return *reinterpret_cast<const Fp8Run*>(from);
  Fp8Run run{};
#pragma unroll
  for (int e = 0; e < kRun; ++e)
    if (e < count) run.word[e / 4] |= uint32_t(from[e]) << (e % 4 * 8);
  return run;
}

/// What is kept of an order; some of the thread's columns exist.
__device__ inline Fp8Runs load(const Fp8Problem& p, int order, const Place& place, uint32_t later = 0) {
  Fp8Runs runs;
  runs.scale = *place.scale_of(p.scales[order], later);
#pragma unroll
  for (int r = 0; r < kRuns; ++r)
    runs.run[r] = load_fp8(place.in<const uint8_t>(p.values[order], r, later), place.count(r), p.values_aligned);
  return runs;
}

/// The columns of the feature, or of what is quantised.
template <class Element>
__device__ inline void load_plain(const Fp8Problem& p, const Place& place, float (&x)[kRuns][kRun]) {
  HalfRun<Element> runs[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r)
    runs[r] = load_run(place.in<const Element>(p.plain, r), place.count(r), p.plain_aligned);
#pragma unroll
  for (int r = 0; r < kRuns; ++r) to_floats(runs[r], x[r]);
}

template <class Element>
__global__ void __launch_bounds__(kTaylorThreads) quantize_fp8_kernel(const __grid_constant__ Fp8Problem p) {
  const Place place(p);
  float x[kRuns][kRun];
  load_plain<Element>(p, place, x);
  store(quantise(x), p, 0, place);
}

template <class Element, int kOrders, bool kLast>
__global__ void __launch_bounds__(kTaylorThreads) update_fp8_kernel(const __grid_constant__ Fp8Problem p) {
  const Place place(p);
  Fp8Runs old[kOrders];
#pragma unroll
  for (int order = 0; order + !kLast < kOrders; ++order)  // what is no history is not read
    if (order < p.valid && place.remaining > 0) old[order] = load(p, order, place);
  float now[kRuns][kRun];
  load_plain<Element>(p, place, now);
  __syncwarp();  // all lanes have read a scale before the first of them writes it
#pragma unroll
  for (int order = 0; order < kOrders; ++order) {
    store(quantise(now), p, order, place);
    const bool more = order < p.valid && place.remaining > 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      float before[kRun] = {};
      if (more) from_fp8(old[order].run[r], before);
#pragma unroll
      for (int e = 0; e < kRun; ++e)  // rounded, as the CPU reads it
        now[r][e] = more ? (now[r][e] - __fmul_rn(old[order].scale, before[e])) * p.per_step : 0.0f;
    }
  }
  if constexpr (kLast) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r)
      store_run(place.in<Element>(p.last, r), from_floats<Element>(now[r]), place.count(r), p.plain_aligned);
  }
}

template <class Element, int kOrders>
__global__ void __launch_bounds__(kTaylorThreads)
    forecast_fp8_kernel(const __grid_constant__ Fp8Problem p, const __grid_constant__ ForecastRowBits rows) {
  const Place place(p);
  if (place.remaining <= 0) return;
  float coefficients[kOrders];
#pragma unroll
  for (int order = 0; order < kOrders; ++order) coefficients[order] = p.coefficients[order * p.coefficient_stride];
  for_wanted_rows(rows, place, p.threads, [&](uint32_t later) {
    Fp8Runs terms[kOrders];
#pragma unroll
    for (int order = 0; order < kOrders; ++order)  // before the coefficients are known, as in taylor.cu
      terms[order] = load(p, order, place, later);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      float sum[kRun] = {};
#pragma unroll
      for (int order = 0; order < kOrders; ++order) {
        if (coefficients[order] == 0) continue;  // an order without history may hold anything
        float term[kRun];
        from_fp8(terms[order].run[r], term);
#pragma unroll
        for (int e = 0; e < kRun; ++e) sum[e] += coefficients[order] * (terms[order].scale * term[e]);
      }
      store_run(place.in<Element>(p.plain, r, later), from_floats<Element>(sum), place.count(r), p.plain_aligned);
    }
  });
}

Rows rows_of(const TensorView& view) {
  Rows rows{view.data, {}};
  for (int d = view.ndim - 2, i = 0; d >= 0; --d, ++i) rows.strides[i] = view.strides[d];
  return rows;
}

/// Whether runs of eight columns start at multiples of `bytes`.
bool is_aligned(const TensorView& view, int64_t element_bytes, uintptr_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
  for (int d = 0; d + 1 < view.ndim; ++d)
    aligned = aligned && (view.shape[d] == 1 || view.strides[d] * element_bytes % int64_t(bytes) == 0);
  return aligned;
}

Fp8Problem problem_of(const TensorView& plain, const TensorView* values, const TensorView* scales, int orders) {
  Fp8Problem p{};
  p.plain = rows_of(plain), p.plain_aligned = is_aligned(plain, 2, 16);
  p.values_aligned = true;
  for (int i = 0; i < orders; ++i) {
    p.values[i] = rows_of(values[i]), p.scales[i] = rows_of(scales[i]);
    p.values_aligned = p.values_aligned && is_aligned(values[i], 1, 8);
  }
  p.width = plain.size(plain.ndim - 1);
  const int64_t rows = plain.numel() / p.width;
  for (int i = 0; i < 2; ++i)
    p.threads.sizes[i] = plain.ndim - 2 - i >= 0 ? static_cast<uint32_t>(plain.size(plain.ndim - 2 - i)) : 1;
  p.threads.a_row = static_cast<uint32_t>(ceil_div(p.width, kScaleColumns) * kLanesAScale);
  if (rows * p.threads.a_row > INT32_MAX) {
    fail(ErrorKind::kNotImplemented, "x", text("at most 2^31 runs of ", kRun * kRuns, " elements"), describe(plain));
  }
  p.threads.rows = static_cast<uint32_t>(rows), p.threads.end = p.threads.sizes[0];
  return p;
}

}  // namespace

void quantize_fp8(const QuantizeArguments& a, const Context& context) {
  const Fp8Problem p = problem_of(a.x, &a.values, &a.scales, 1);
  with_half_type(a.x.dtype, "x", [&](auto* type) {
    quantize_fp8_kernel<std::remove_pointer_t<decltype(type)>>
        <<<p.threads.grid(), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "quantize_fp8_kernel");
}

void update_fp8(const TaylorUpdateArguments& a, const Context& context) {
  Fp8Problem p = problem_of(a.feature, a.derivatives.data(), a.scales.data(), a.orders);
  p.valid = a.valid, p.per_step = 1.0f / a.gap;
  if (a.last.present()) p.last = rows_of(a.last), p.plain_aligned = p.plain_aligned && is_aligned(a.last, 2, 16);
  with_update_kernel(a, [&](auto* type, auto orders, auto last) {
    update_fp8_kernel<std::remove_pointer_t<decltype(type)>, decltype(orders)::value, decltype(last)::value>
        <<<p.threads.grid(), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "update_fp8_kernel");
}

void forecast_fp8(const TaylorForecastArguments& a, const Context& context) {
  Fp8Problem p = problem_of(a.out, a.derivatives.data(), a.scales.data(), a.orders);
  p.coefficients = a.coefficients.as<const float>();
  p.coefficient_stride = a.orders > 1 ? a.coefficients.strides[0] : 0;
  const ForecastRowBits rows(a);
  if (rows.some) p.threads.share();
  with_taylor_kernel(a.out.dtype, "out", a.orders, [&](auto* type, auto orders) {
    forecast_fp8_kernel<std::remove_pointer_t<decltype(type)>, decltype(orders)::value>
        <<<p.threads.grid(), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p, rows);
  });
  check_cuda(cudaGetLastError(), "forecast_fp8_kernel");
}

}  // namespace flashomni::cuda
