// A row's threads hold it in registers from the one read to the one write: a warp a row where it fits, so that no
// warp waits for another.
#include "flashomni/ada_layer_norm.h"

#include <type_traits>

#include "flashomni/symbols.h"
#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/half_run.cuh"
#include "src/cuda/common/lane_sums.cuh"
#include "src/cuda/common/launch.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 128;  // of a CTA, which takes a row or several
constexpr int kMostRuns = 12;  // of a thread: four registers each

struct AdaLayerNormProblem {
  const void *x, *scale, *shift;
  void* out;
  int64_t x_strides[2], out_strides[2];  // batch, row
  int64_t scale_stride, shift_stride;
  int rows, width;
  float eps;
};

template <class Element>
__device__ inline HalfRun<Element> load_part(const Element* from, int count, bool aligned) {
  if (aligned) return load_run(from, true);
  HalfRun<Element> run{};
#pragma unroll
  for (int e = 0; e < kRun; ++e)
    if (e < count) run.element[e] = from[e];
  return run;
}

/// threadIdx.y: the CTA's rows. kRuns: at most, of a thread. kAligned: all runs are whole and aligned.
template <class Element, int kRuns, bool kAligned>
__global__ void __launch_bounds__(kThreads, kRuns > 8 ? 5 : 6)
    ada_layer_norm_kernel(const __grid_constant__ AdaLayerNormProblem p) {
  __shared__ float sums[2][kThreads / kWarp];
  const int row = blockIdx.x * blockDim.y + threadIdx.y, batch = blockIdx.y;
  const Element* x = static_cast<const Element*>(p.x) + batch * p.x_strides[0] + row * p.x_strides[1];
  const Element* scales = static_cast<const Element*>(p.scale) + batch * p.scale_stride;
  const Element* shifts = static_cast<const Element*>(p.shift) + batch * p.shift_stride;
  Element* out = static_cast<Element*>(p.out) + batch * p.out_strides[0] + row * p.out_strides[1];
  /// Columns of the thread's i-th run: 8 or fewer at the row's end, 0 or less past it.
  const auto column_of = [](int i) { return static_cast<int>(threadIdx.x + i * blockDim.x) * kRun; };
  const auto count_of = [&](int i) { return row < p.rows ? p.width - column_of(i) : 0; };

  HalfRun<Element> part[kRuns] = {};
#pragma unroll
  for (int i = 0; i < kRuns; ++i)
    if (count_of(i) > 0) part[i] = load_part(x + column_of(i), count_of(i), kAligned);

  float values[kRun], sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {  // what is past the end is 0
    to_floats(part[i], values);
#pragma unroll
    for (int e = 0; e < kRun; ++e) sum += values[e];
    keep_packed(part[i]);
  }
  const float mean = sum_of_row(sum, sums[0]) / static_cast<float>(p.width);
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    to_floats(part[i], values);
#pragma unroll
    for (int e = 0; e < kRun; ++e)
      if (e < count_of(i)) squares += (values[e] - mean) * (values[e] - mean);
    keep_packed(part[i]);
  }
  const float factor = 1.0f / sqrtf(sum_of_row(squares, sums[1]) / static_cast<float>(p.width) + p.eps);

#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    const int count = count_of(i);
    if (count <= 0) continue;
    float scale[kRun], shift[kRun];
    to_floats(load_part(scales + column_of(i), count, kAligned), scale);
    to_floats(load_part(shifts + column_of(i), count, kAligned), shift);
    to_floats(part[i], values);
#pragma unroll
    for (int e = 0; e < kRun; ++e) values[e] = (values[e] - mean) * factor * (1.0f + scale[e]) + shift[e];
    const HalfRun<Element> rounded = from_floats<Element>(values);
    if (kAligned) {
      store_run(out + column_of(i), rounded, true);
    } else {
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        if (e < count) out[column_of(i) + e] = rounded.element[e];
    }
  }
}

/// Calls f with at least `runs` as a constant.
template <class F>
void with_runs(int64_t runs, F&& f) {
  if (runs <= 4) return f(std::integral_constant<int, 4>());
  if (runs <= 8) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, kMostRuns>());
}

}  // namespace

void ada_layer_norm(const AdaLayerNormArguments& a, const Context& context) {
  AdaLayerNormProblem p{a.x.data, a.scale.data, a.shift.data, a.out.data};
  for (int i = 0; i < 2; ++i) p.x_strides[i] = a.x.strides[i], p.out_strides[i] = a.out.strides[i];
  p.scale_stride = a.scale.strides[0], p.shift_stride = a.shift.strides[0];
  p.rows = static_cast<int>(a.x.size(1)), p.width = static_cast<int>(a.x.size(2)), p.eps = a.eps;
  const int64_t runs = ceil_div(a.x.size(2), int64_t{kRun} * kWarp);  // of a warp's thread
  const int64_t warps = ceil_div(runs, int64_t{kMostRuns});
  if (warps > kThreads / kWarp)
    fail(ErrorKind::kNotImplemented, "x", text("at most ", kMostRuns * kThreads * kRun, " columns (cuda_sm90)"),
         text(a.x.size(2)));
  const bool aligned = a.x.size(2) % kRun == 0 && runs_aligned(a.x) && runs_aligned(a.scale) &&
                       runs_aligned(a.shift) && runs_aligned(a.out);
  const dim3 block(kWarp * warps, warps == 1 ? kThreads / kWarp : 1);
  const dim3 grid((p.rows + block.y - 1) / block.y, static_cast<unsigned>(a.x.size(0)));
  const auto stream = static_cast<cudaStream_t>(context.stream);
  with_half_type(a.x.dtype, "x", [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    with_runs(ceil_div(runs, warps), [&](auto most) {
      if (aligned)
        ada_layer_norm_kernel<Element, decltype(most)::value, true><<<grid, block, 0, stream>>>(p);
      else
        ada_layer_norm_kernel<Element, decltype(most)::value, false><<<grid, block, 0, stream>>>(p);
    });
  });
  check_cuda(cudaGetLastError(), "ada_layer_norm_kernel");
}

}  // namespace flashomni::cuda
