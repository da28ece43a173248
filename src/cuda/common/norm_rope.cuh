// What the kernels that norm and rotate rows share: the problem, and the arithmetic of a run of columns. Where each
// head has a norm of its own, a group of lanes holds its row, a run each; how many is the next power of two that
// holds the row's runs.
#pragma once

#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/half_run.cuh"
#include "src/cuda/common/lane_sums.cuh"

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

/// Of `x` in place of a.x, with a weight and symbols of its own.
inline NormRopeProblem problem_of(const NormRopeArguments& a, const TensorView& x, const TensorView& weight,
                                  const TensorView& cache) {
  NormRopeProblem p{};
  p.x = x.data;
  for (int i = 0; i < 3; ++i) p.strides[i] = x.strides[i];
  if (weight.present()) p.weight = weight.data, p.weight_aligned = runs_aligned(weight);
  if (a.cos.present()) {
    p.cos = a.cos.as<const float>(), p.sin = a.sin.as<const float>();
    p.cos_stride = a.cos.strides[0], p.sin_stride = a.sin.strides[0];
    p.tables_aligned = runs_aligned(a.cos) && runs_aligned(a.sin);
  }
  if (cache.present()) p.cache = cache.as<const uint8_t>(), p.cache_stride = cache.strides[0];
  p.row_offset = a.row_offset, p.block_q = a.block_q, p.eps = a.eps;
  p.rows = static_cast<int>(x.size(1)), p.heads = static_cast<int>(x.size(2));
  p.dim = static_cast<int>(x.size(3)), p.aligned = runs_aligned(x);
  return p;
}

/// What one launch does: x, the keys, or both. The grid's z counts batch elements of the first, then of the other.
struct NormRopeProblems {
  NormRopeProblem of[2];
  int count, batch;

  void add(const NormRopeProblem& problem) { of[count++] = problem; }
  /// Whether every run of all of them can be moved in one access.
  bool aligned() const {
    bool all = true;
    for (int i = 0; i < count; ++i)
      all = all && of[i].aligned && (of[i].weight == nullptr || of[i].weight_aligned) &&
            (of[i].cos == nullptr || of[i].tables_aligned);
    return all;
  }
  int most_heads() const { return count == 2 && of[1].heads > of[0].heads ? of[1].heads : of[0].heads; }
  unsigned grid_z() const { return static_cast<unsigned>(count) * static_cast<unsigned>(batch); }
};

/// The norms of all of them are over all heads of a token.
void norm_rope_across_heads(const NormRopeProblems& problems, DType dtype, cudaStream_t stream);

/// Which heads of one token are active.
struct ActiveHeads {
  const uint8_t* bits = nullptr;  // null: all
  int first = 0;                  // bit of head 0

  __device__ ActiveHeads(const NormRopeProblem& p, int batch, int64_t position) {
    if (p.cache == nullptr) return;
    const int64_t bit = position / p.block_q * p.heads;
    bits = p.cache + batch * p.cache_stride + bit / 8, first = bit % 8;
  }
  __device__ bool has(int head) const {
    const uint32_t bit = first + head;
    return bits == nullptr || (bits[bit / 8] >> bit % 8 & 1);
  }
};

/// Calls f with a constant: kernels for unaligned runs move them element by element, in many more registers.
template <class F>
void with_alignment(const NormRopeProblems& q, F&& f) {
  if (q.aligned()) return f(std::true_type());
  f(std::false_type());
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

__device__ inline float squares_of_run(const float (&values)[kRun]) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) squares += values[i] * values[i];
  return squares;
}

template <int kLanes>
__device__ inline float sum_of_squares(const float (&values)[kRun]) {
  return sum_of_lanes<kLanes>(squares_of_run(values));
}

__device__ inline float norm_factor(const NormRopeProblem& p, float squares, int count) {
  return 1.0f / sqrtf(squares / static_cast<float>(count) + p.eps);
}

__device__ inline void scale(float factor, const float (&weight)[kRun], float (&values)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] *= factor * weight[i];
}

template <int kLanes>
__device__ inline void normalize(const NormRopeProblem& p, const float (&weight)[kRun], float (&values)[kRun]) {
  scale(norm_factor(p, sum_of_squares<kLanes>(values), p.dim), weight, values);
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
