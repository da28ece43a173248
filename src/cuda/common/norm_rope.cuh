// What the kernels that norm and rotate rows share: the problem, and the arithmetic of a run of columns. A group of
// lanes holds a row, a run each; how many is the next power of two that holds the row's runs.
#pragma once

#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/half_run.cuh"

namespace flashomni::cuda {

struct NormRopeProblem {
  void* x;
  const void* weight;      // null: no norm
  const float *cos, *sin;  // null: no rotation
  const uint8_t* cache;    // null: every tile is active
  int64_t strides[3], cos_stride, sin_stride, cache_stride, row_offset;
  int rows, heads, dim, block_q;
  float eps;
  bool aligned, weight_aligned, tables_aligned;
};

inline NormRopeProblem problem_of(const NormRopeArguments& a) {
  NormRopeProblem p{};
  p.x = a.x.data;
  for (int i = 0; i < 3; ++i) p.strides[i] = a.x.strides[i];
  if (a.weight.present()) p.weight = a.weight.data, p.weight_aligned = runs_aligned(a.weight);
  if (a.cos.present()) {
    p.cos = a.cos.as<const float>(), p.sin = a.sin.as<const float>();
    p.cos_stride = a.cos.strides[0], p.sin_stride = a.sin.strides[0];
    p.tables_aligned = runs_aligned(a.cos) && runs_aligned(a.sin);
  }
  if (a.cache.present()) p.cache = a.cache.as<const uint8_t>(), p.cache_stride = a.cache.strides[0];
  p.row_offset = a.row_offset, p.block_q = a.block_q, p.eps = a.eps;
  p.rows = static_cast<int>(a.x.size(1)), p.heads = static_cast<int>(a.x.size(2));
  p.dim = static_cast<int>(a.x.size(3)), p.aligned = runs_aligned(a.x);
  return p;
}

/// Calls f with the lanes of a group as a constant.
template <class F>
void with_lanes(int dim, F&& f) {
  if (dim <= 64) return f(std::integral_constant<int, 8>());
  if (dim <= 128) return f(std::integral_constant<int, 16>());
  f(std::integral_constant<int, 32>());
}

__device__ inline void load_floats(const float* from, bool aligned, float (&values)[kRun]) {
  if (aligned) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    const float all[kRun] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = all[i];
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = from[i];
  }
}

/// Over a group's row; every lane has the result. All lanes of the warp take part.
template <int kLanes>
__device__ inline float sum_of_squares(const float (&values)[kRun]) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) squares += values[i] * values[i];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    squares += __shfl_xor_sync(~0u, squares, distance);
  return squares;
}

template <int kLanes>
__device__ inline void normalize(const NormRopeProblem& p, const float (&weight)[kRun], float (&values)[kRun]) {
  const float factor = 1.0f / sqrtf(sum_of_squares<kLanes>(values) / static_cast<float>(p.dim) + p.eps);
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] *= factor * weight[i];
}

__device__ inline void rotate(const float (&cosine)[kRun], const float (&sine)[kRun], float (&values)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i += 2) {
    const float even = values[i], odd = values[i + 1];
    values[i] = even * cosine[i] - odd * sine[i];
    values[i + 1] = odd * cosine[i + 1] + even * sine[i + 1];
  }
}

}  // namespace flashomni::cuda
