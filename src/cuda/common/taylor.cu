// Differences and forecasts. A thread takes a run of elements and asks for all that it reads of it before it
// computes: two runs a thread move 6 to 12% less a second, four 30 to 40% less.
#include <algorithm>

#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/launch.h"
#include "src/cuda/common/taylor.cuh"

namespace flashomni::cuda {
namespace {

struct TaylorProblem {
  Rows derivatives[kMostOrders], other, last;  // other: the feature, or the forecast
  const float* coefficients;
  int64_t coefficient_stride, width;
  RowThreads threads;
  int valid;
  float per_step;
  bool aligned;
};

/// Where a thread's run lies.
struct Place : RowPlace {
  int64_t column;
  int count;  // columns of this run; 0 past the last row

  __device__ explicit Place(const TaylorProblem& p) : RowPlace(p.threads), column(int64_t(lane) * kRun) {
    count = static_cast<int>(exists ? min(int64_t(kRun), p.width - column) : 0);
  }
  template <class Element>
  __device__ Element* in(const Rows& rows, uint32_t later = 0) const {
    return row_of<Element>(rows, later) + column;
  }
};

template <class Element, int kOrders, bool kLast>
__global__ void __launch_bounds__(kTaylorThreads) taylor_update_kernel(const __grid_constant__ TaylorProblem p) {
  const Place place(p);
  if (place.count == 0) return;
  const HalfRun<Element> feature = load_run(place.in<const Element>(p.other), place.count, p.aligned);
  HalfRun<Element> old[kOrders];
#pragma unroll
  for (int order = 0; order + !kLast < kOrders; ++order)  // what is no history is not read
    if (order < p.valid) old[order] = load_run(place.in<const Element>(p.derivatives[order]), place.count, p.aligned);
  float now[kRun];
  to_floats(feature, now);
#pragma unroll
  for (int order = 0; order < kOrders; ++order) {
    store_run(place.in<Element>(p.derivatives[order]), from_floats<Element>(now), place.count, p.aligned);
    const bool more = order < p.valid;
    float before[kRun] = {};
    if (more) to_floats(old[order], before);
#pragma unroll
    for (int e = 0; e < kRun; ++e) now[e] = more ? (now[e] - before[e]) * p.per_step : 0.0f;
  }
  if constexpr (kLast) store_run(place.in<Element>(p.last), from_floats<Element>(now), place.count, p.aligned);
}

template <class Element, int kOrders>
__global__ void __launch_bounds__(kTaylorThreads)
    taylor_forecast_kernel(const __grid_constant__ TaylorProblem p, const __grid_constant__ ForecastRowBits rows) {
  const Place place(p);
  if (place.count == 0) return;
  float coefficients[kOrders];
#pragma unroll
  for (int order = 0; order < kOrders; ++order) coefficients[order] = p.coefficients[order * p.coefficient_stride];
  for_wanted_rows(rows, place, p.threads, [&](uint32_t later) {
    // All orders are asked for before their coefficients are known: to wait for those first would cost as much as
    // a read of an order that does not count, and that is rare.
    HalfRun<Element> terms[kOrders];
#pragma unroll
    for (int order = 0; order < kOrders; ++order)
      terms[order] = load_run(place.in<const Element>(p.derivatives[order], later), place.count, p.aligned);
    float sum[kRun] = {};
#pragma unroll
    for (int order = 0; order < kOrders; ++order) {
      if (coefficients[order] == 0) continue;  // an order without history may hold anything
      float term[kRun];
      to_floats(terms[order], term);
#pragma unroll
      for (int e = 0; e < kRun; ++e) sum[e] += coefficients[order] * term[e];
    }
    store_run(place.in<Element>(p.other, later), from_floats<Element>(sum), place.count, p.aligned);
  });
}

/// The dimensions that views of one shape have in common, the last one first, without those of size 1;
/// neighbours that lie in one piece in every view count as one. Or, where a row is one of a sequence, as they are.
struct Shape {
  int dims = 0;
  int64_t sizes[kMaxDims];
  int64_t strides[kMostOrders + 2][kMaxDims];

  Shape(const TensorView* const* views, int count, bool as_it_is) {
    for (int d = views[0]->ndim - 1; d >= 0; --d) {
      const int64_t size = views[0]->shape[d];
      if (!as_it_is && size == 1) continue;
      if (!as_it_is && dims > 0 && continues(views, count, d)) {
        sizes[dims - 1] *= size;
        continue;
      }
      sizes[dims] = size;
      for (int v = 0; v < count; ++v)  // what a dimension of size 1 has for a stride says nothing
        strides[v][dims] = size > 1 ? views[v]->strides[d] : dims == 0 ? 1 : 0;
      ++dims;
    }
  }
  /// Whether dimension d goes on where the one before ends.
  bool continues(const TensorView* const* views, int count, int d) const {
    for (int v = 0; v < count; ++v)
      if (views[v]->strides[d] != strides[v][dims - 1] * sizes[dims - 1]) return false;
    return true;
  }
  /// Whether the last dimension lies in one piece; it may not where the tensor's own last one is of size 1.
  bool has_rows(int count) const {
    bool dense = dims > 0;
    for (int v = 0; dense && v < count; ++v) dense = strides[v][0] == 1;
    return dense;
  }
};

/// What both operators share. last: or absent. by_rows: row r of batch element b of [B, M, N] is at index (r, b).
TaylorProblem problem_of(const TensorView* derivatives, int orders, const TensorView& other, const TensorView& last,
                         bool by_rows) {
  TaylorProblem p{};
  const TensorView* views[kMostOrders + 2] = {&other};
  Rows* rows_of[kMostOrders + 2] = {&p.other};
  int count = 1;
  for (int i = 0; i < orders; ++i) views[count] = &derivatives[i], rows_of[count++] = &p.derivatives[i];
  if (last.present()) views[count] = &last, rows_of[count++] = &p.last;
  const Shape shape(views, count, by_rows);
  const int first = shape.has_rows(count) ? 1 : 0;  // of the leading dimensions, at most three
  p.width = first == 1 ? shape.sizes[0] : 1;
  p.threads.sizes[0] = p.threads.sizes[1] = 1;
  p.aligned = true;
  int64_t rows = 1;
  for (int d = first; d < shape.dims; ++d) {
    rows *= shape.sizes[d];
    if (d - first < 2) p.threads.sizes[d - first] = static_cast<uint32_t>(shape.sizes[d]);
  }
  for (int v = 0; v < count; ++v) {
    Rows& to = *rows_of[v];
    to.data = views[v]->data;
    p.aligned = p.aligned && reinterpret_cast<uintptr_t>(to.data) % 16 == 0;
    for (int d = first; d < shape.dims; ++d) {
      to.strides[d - first] = shape.strides[v][d];
      p.aligned = p.aligned && shape.strides[v][d] % kRun == 0;
    }
  }
  const int64_t runs_a_row = ceil_div(p.width, kRun), runs = rows * runs_a_row;
  if (runs > INT32_MAX) {
    fail(ErrorKind::kNotImplemented, "derivatives", text("at most 2^31 runs of ", kRun, " elements"), text(runs));
  }
  p.threads.a_row = static_cast<uint32_t>(runs_a_row), p.threads.rows = static_cast<uint32_t>(rows);
  p.threads.end = p.threads.sizes[0];
  return p;
}

}  // namespace

void taylor_update(const TaylorUpdateArguments& a, const Context& context) {
  if (a.scales[0].present()) return update_fp8(a, context);
  TaylorProblem p = problem_of(a.derivatives.data(), a.orders, a.feature, a.last, false);
  p.valid = a.valid, p.per_step = 1.0f / a.gap;
  with_update_kernel(a, [&](auto* type, auto orders, auto last) {
    taylor_update_kernel<std::remove_pointer_t<decltype(type)>, decltype(orders)::value, decltype(last)::value>
        <<<p.threads.grid(), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "taylor_update_kernel");
}

void taylor_forecast(const TaylorForecastArguments& a, const Context& context) {
  if (a.scales[0].present()) return forecast_fp8(a, context);
  const ForecastRowBits rows(a);
  TaylorProblem p = problem_of(a.derivatives.data(), a.orders, a.out, TensorView{}, rows.some);
  if (rows.some) p.threads.share();
  p.coefficients = a.coefficients.as<const float>();
  p.coefficient_stride = a.orders > 1 ? a.coefficients.strides[0] : 0;
  with_taylor_kernel(a.out.dtype, "out", a.orders, [&](auto* type, auto orders) {
    taylor_forecast_kernel<std::remove_pointer_t<decltype(type)>, decltype(orders)::value>
        <<<p.threads.grid(), kTaylorThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p, rows);
  });
  check_cuda(cudaGetLastError(), "taylor_forecast_kernel");
}

}  // namespace flashomni::cuda
