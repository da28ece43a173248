// To e4m3 with a scale for every 128 columns of a row, and differences and forecasts of what is kept so. Sixteen lanes
// hold 128 columns, so a scale is one reduction among neighbours.
#include <cuda_fp8.h>

#include <algorithm>

#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/launch.h"
#include "src/cuda/common/taylor.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kLanesAScale = kScaleColumns / kRun;
constexpr float kLargest = 448, kNothing = 0x1p-100f;

struct alignas(8) Fp8Run {
  __nv_fp8x2_storage_t pair[kRun / 2];
};

struct Fp8Problem {
  Rows values[kMostOrders], scales[kMostOrders], plain;  // plain: x, the feature, or the forecast
  const float* coefficients;
  int64_t coefficient_stride, width;
  uint32_t rows;
  uint32_t sizes[2];     // of the leading dimensions, the last one first; the third follows from them
  uint32_t runs_a_row;   // a multiple of kLanesAScale: groups of lanes do not cross rows
  bool plain_aligned, values_aligned;
  int valid;
  float per_step;
};

/// Where this thread's run lies. In 32 bits: divisions of 64 took longer than the memory.
struct Place {
  uint32_t index[3];
  int64_t column;
  int count;  // columns of this run; 0 or less past the end of a row

  __device__ explicit Place(const Fp8Problem& p) {
    const uint32_t run = blockIdx.x * kTaylorThreads + threadIdx.x;
    const uint32_t row = run / p.runs_a_row, rest = row / p.sizes[0];
    column = int64_t(run - row * p.runs_a_row) * kRun;
    count = static_cast<int>(row < p.rows ? min(int64_t(kRun), p.width - column) : 0);
    index[0] = row - rest * p.sizes[0];
    index[2] = rest / p.sizes[1];
    index[1] = rest - index[2] * p.sizes[1];
  }
  template <class Element>
  __device__ Element* row_of(const Rows& rows) const {
    return static_cast<Element*>(rows.data) + index[0] * rows.strides[0] + index[1] * rows.strides[1] +
           index[2] * rows.strides[2];
  }
  __device__ float* scale_of(const Rows& rows) const { return row_of<float>(rows) + column / kScaleColumns; }
};

__device__ inline Fp8Run to_fp8(const float (&x)[kRun], float inverse) {
  Fp8Run run;
#pragma unroll
  for (int i = 0; i < kRun; i += 2)
    run.pair[i / 2] =
        __nv_cvt_float2_to_fp8x2(make_float2(x[i] * inverse, x[i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
  return run;
}
__device__ inline void from_fp8(const Fp8Run& run, float (&x)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i += 2) {
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(run.pair[i / 2], __NV_E4M3)));
    x[i] = pair.x, x[i + 1] = pair.y;
  }
}

/// What the lanes of a group make of their columns: one scale for all of them.
struct QuantisedRun {
  Fp8Run values;
  float scale;
};

/// All lanes of the warp take part; columns past the end of a row are 0.
__device__ inline QuantisedRun quantise(const float (&x)[kRun]) {
  float most = 0;
#pragma unroll
  for (int e = 0; e < kRun; ++e) most = fmaxf(most, fabsf(x[e]));  // passes over a NaN
#pragma unroll
  for (int distance = kLanesAScale / 2; distance > 0; distance /= 2)
    most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
  if (most < kNothing) most = 0;
  return {to_fp8(x, most > 0 ? kLargest / most : 0.0f), most / kLargest};
}

__device__ inline void store(const QuantisedRun& run, const Fp8Problem& p, int order, const Place& place) {
  if (place.count <= 0) return;
  if (place.column % kScaleColumns == 0) *place.scale_of(p.scales[order]) = run.scale;
  uint8_t* to = place.row_of<uint8_t>(p.values[order]) + place.column;
  if (place.count == kRun && p.values_aligned) {
    *reinterpret_cast<Fp8Run*>(to) = run.values;
  } else {
#pragma unroll
    for (int e = 0; e < kRun; ++e)
      if (e < place.count) to[e] = static_cast<uint8_t>(run.values.pair[e / 2] >> (e % 2 * 8));
  }
}

/// The columns of the feature, or of what is quantised.
template <class Element>
__device__ inline HalfRun<Element> load_plain(const Fp8Problem& p, const Place& place) {
  return load_run(place.row_of<const Element>(p.plain) + place.column, place.count, p.plain_aligned);
}

template <class Element>
__global__ void __launch_bounds__(kTaylorThreads) quantize_fp8_kernel(const __grid_constant__ Fp8Problem p) {
  const Place place(p);
  float x[kRun];
  to_floats(load_plain<Element>(p, place), x);
  store(quantise(x), p, 0, place);
}

/// The run at `from`, of which `count` columns exist.
__device__ inline Fp8Run load_fp8(const uint8_t* from, int count, bool aligned) {
  if (count == kRun && aligned) return *reinterpret_cast<const Fp8Run*>(from);
  Fp8Run run;
#pragma unroll
  for (int e = 0; e < kRun; e += 2)
    run.pair[e / 2] = static_cast<__nv_fp8x2_storage_t>((e < count ? from[e] : 0) |
                                                        (e + 1 < count ? from[e + 1] : 0) << 8);
  return run;
}

template <class Element, int kOrders>
__global__ void __launch_bounds__(kTaylorThreads) update_fp8_kernel(const __grid_constant__ Fp8Problem p) {
  const Place place(p);
  const HalfRun<Element> feature = load_plain<Element>(p, place);
  Fp8Run old[kOrders];
  float factors[kOrders];
#pragma unroll
  for (int order = 0; order + 1 < kOrders; ++order) {  // what is no history is not read
    if (order >= p.valid || place.count <= 0) continue;
    factors[order] = *place.scale_of(p.scales[order]);
    old[order] = load_fp8(place.row_of<const uint8_t>(p.values[order]) + place.column, place.count, p.values_aligned);
  }
  __syncwarp();  // all lanes have read a scale before the first of them writes it
  float now[kRun];
  to_floats(feature, now);
#pragma unroll
  for (int order = 0; order < kOrders; ++order) {
    store(quantise(now), p, order, place);
    const bool more = order < p.valid && place.count > 0;
    float before[kRun] = {};
    if (more) from_fp8(old[order], before);
#pragma unroll
    for (int e = 0; e < kRun; ++e)  // rounded, as the CPU reads it
      now[e] = more ? (now[e] - __fmul_rn(factors[order], before[e])) * p.per_step : 0.0f;
  }
}

template <class Element, int kOrders>
__global__ void __launch_bounds__(kTaylorThreads)
    forecast_fp8_kernel(const __grid_constant__ Fp8Problem p, const __grid_constant__ ForecastRowBits rows) {
  const Place place(p);
  if (place.count <= 0 || !rows.has(place.index[1], place.index[0])) return;
  Fp8Run terms[kOrders];
  float factors[kOrders];
#pragma unroll
  for (int order = 0; order < kOrders; ++order) {  // before the coefficients are known, as in taylor.cu
    factors[order] = *place.scale_of(p.scales[order]);
    terms[order] = load_fp8(place.row_of<const uint8_t>(p.values[order]) + place.column, place.count, p.values_aligned);
  }
  float sum[kRun] = {};
#pragma unroll
  for (int order = 0; order < kOrders; ++order) {
    const float coefficient = p.coefficients[order * p.coefficient_stride];
    if (coefficient == 0) continue;  // an order without history may hold anything
    float term[kRun];
    from_fp8(terms[order], term);
#pragma unroll
    for (int e = 0; e < kRun; ++e) sum[e] += coefficient * (factors[order] * term[e]);
  }
  Element* to = place.row_of<Element>(p.plain) + place.column;
  store_run(to, from_floats<Element>(sum), place.count, p.plain_aligned);
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
    p.sizes[i] = plain.ndim - 2 - i >= 0 ? static_cast<uint32_t>(plain.size(plain.ndim - 2 - i)) : 1;
  p.runs_a_row = static_cast<uint32_t>(ceil_div(p.width, kScaleColumns) * kLanesAScale);
  if (rows * p.runs_a_row > INT32_MAX)
    fail(ErrorKind::kNotImplemented, "x", text("at most 2^31 runs of ", kRun, " elements"), describe(plain));
  p.rows = static_cast<uint32_t>(rows);
  return p;
}

dim3 grid_of(const Fp8Problem& p) {
  return dim3(static_cast<unsigned>(ceil_div(int64_t(p.rows) * p.runs_a_row, kTaylorThreads)));
}

}  // namespace

void quantize_fp8(const QuantizeArguments& a, const Context& context) {
  const Fp8Problem p = problem_of(a.x, &a.values, &a.scales, 1);
  with_half_type(a.x.dtype, "x", [&](auto* type) {
    quantize_fp8_kernel<std::remove_pointer_t<decltype(type)>>
        <<<grid_of(p), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "quantize_fp8_kernel");
}

void update_fp8(const TaylorUpdateArguments& a, const Context& context) {
  Fp8Problem p = problem_of(a.feature, a.derivatives.data(), a.scales.data(), a.orders);
  p.valid = a.valid, p.per_step = 1.0f / a.gap;
  with_taylor_kernel(a.feature.dtype, "feature", a.orders, [&](auto* type, auto orders) {
    update_fp8_kernel<std::remove_pointer_t<decltype(type)>, decltype(orders)::value>
        <<<grid_of(p), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "update_fp8_kernel");
}

void forecast_fp8(const TaylorForecastArguments& a, const Context& context) {
  Fp8Problem p = problem_of(a.out, a.derivatives.data(), a.scales.data(), a.orders);
  p.coefficients = a.coefficients.as<const float>();
  p.coefficient_stride = a.orders > 1 ? a.coefficients.strides[0] : 0;
  const ForecastRowBits rows(a);
  with_taylor_kernel(a.out.dtype, "out", a.orders, [&](auto* type, auto orders) {
    forecast_fp8_kernel<std::remove_pointer_t<decltype(type)>, decltype(orders)::value>
        <<<grid_of(p), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p, rows);
  });
  check_cuda(cudaGetLastError(), "forecast_fp8_kernel");
}

}  // namespace flashomni::cuda
