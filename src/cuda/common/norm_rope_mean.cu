// Norm, RoPE, block means and block self-similarities in one read of q or k; also block_mean with similarities,
// which changes nothing.
//
// A CTA a (block of tokens, some heads): groups of lanes take the block's rows in turns, as norm_rope's do, and keep
// the sums of each head in registers; then warps add theirs up in shared memory, always in the same order. Means are
// of what is stored, so of rounded values.
#include "src/cuda/common/launch.h"
#include "src/cuda/common/norm_rope.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
/// Heads of a CTA: the rotation is read once for them, and their sums fit into registers.
template <bool kSimilarity>
inline constexpr int kHeadsOf = kSimilarity ? 2 : 4;

struct NormRopeMeanProblem {
  NormRopeProblem rows;
  float *mean, *similarity;  // similarity may be null
  int64_t mean_strides[3], similarity_strides[3];  // batch, block, head
  int block;
};

template <int kLanes, int kHeads>
using Partial = float[kWarps][kHeads][kLanes * kRun];

/// Sums over the CTA's rows: those of a warp into its part of shared memory.
template <int kLanes, int kHeads>
__device__ void add_up(float (&sum)[kHeads][kRun], Partial<kLanes, kHeads>& partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the last readers are done
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
#pragma unroll
      for (int distance = kLanes; distance < 32; distance *= 2)
        sum[h][i] += __shfl_xor_sync(~0u, sum[h][i], distance);
      if (lane < kLanes) partial[warp][h][lane * kRun + i] = sum[h][i];
    }
  }
  __syncthreads();
}
template <int kLanes, int kHeads>
__device__ float total_at(const Partial<kLanes, kHeads>& partial, int h, int column) {
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += partial[warp][h][column];
  return total;
}

template <class Element, int kLanes, bool kSimilarity>
__global__ void __launch_bounds__(kThreads, 2) norm_rope_mean_kernel(const __grid_constant__ NormRopeMeanProblem q) {
  constexpr int kHeads = kHeadsOf<kSimilarity>;
  __shared__ Partial<kLanes, kHeads> partial;
  const NormRopeProblem& p = q.rows;
  constexpr int kRows = kThreads / kLanes;  // at a time
  const int column = threadIdx.x % kLanes * kRun, own = threadIdx.x / kLanes;
  const int first_head = blockIdx.y * kHeads, heads = min(kHeads, p.heads - first_head), batch = blockIdx.z;
  const int first = blockIdx.x * q.block, rows = min(q.block, p.rows - first);
  Element* x = static_cast<Element*>(p.x) + batch * p.strides[0] + first * p.strides[1] +
               first_head * p.strides[2] + column;
  float weight[kRun] = {};
  if (column < p.dim && p.weight != nullptr)
    to_floats(load_run(static_cast<const Element*>(p.weight) + column, p.weight_aligned), weight);

  float sum[kHeads][kRun] = {}, units[kHeads][kRun] = {};
  for (int row = own; row - own < rows; row += kRows) {  // every lane goes on as long as one of its warp does
    const bool works = row < rows && column < p.dim;
    HalfRun<Element> part[kHeads] = {};
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
      if (works && h < heads) part[h] = load_run(x + row * p.strides[1] + h * p.strides[2], p.aligned);
    float cosine[kRun] = {}, sine[kRun] = {};
    if (works && p.cos != nullptr) {
      const int64_t position = p.row_offset + first + row;
      load_floats(p.cos + position * p.cos_stride + column, p.tables_aligned, cosine);
      load_floats(p.sin + position * p.sin_stride + column, p.tables_aligned, sine);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float values[kRun];
      to_floats(part[h], values);
      if (p.weight != nullptr || p.cos != nullptr) {
        if (p.weight != nullptr) normalize<kLanes>(p, weight, values);
        if (p.cos != nullptr) rotate(cosine, sine, values);
        const HalfRun<Element> rounded = from_floats<Element>(values);
        if (works && h < heads) store_run(x + row * p.strides[1] + h * p.strides[2], rounded, p.aligned);
        to_floats(rounded, values);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) sum[h][i] += values[i];
      if constexpr (kSimilarity) {
        const float squares = sum_of_squares<kLanes>(values);
        const float inverse = squares > 0 ? 1.0f / sqrtf(squares) : 0.0f;
#pragma unroll
        for (int i = 0; i < kRun; ++i) units[h][i] += values[i] * inverse;
      }
    }
  }

  add_up<kLanes, kHeads>(sum, partial);
  float* mean = q.mean + batch * q.mean_strides[0] + blockIdx.x * q.mean_strides[1];
  for (int at = threadIdx.x; at < heads * p.dim; at += kThreads) {
    const int h = at / p.dim, d = at % p.dim;
    mean[(first_head + h) * q.mean_strides[2] + d] = total_at<kLanes, kHeads>(partial, h, d) / static_cast<float>(rows);
  }
  if constexpr (kSimilarity) {
    add_up<kLanes, kHeads>(units, partial);
    const int h = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (h >= heads) return;
    float squares = 0;
    for (int d = lane; d < p.dim; d += 32) {
      const float total = total_at<kLanes, kHeads>(partial, h, d);
      squares += total * total;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(~0u, squares, distance);
    if (lane == 0) {
      q.similarity[batch * q.similarity_strides[0] + blockIdx.x * q.similarity_strides[1] +
                   (first_head + h) * q.similarity_strides[2]] = squares / static_cast<float>(rows * rows);
    }
  }
}

}  // namespace

void norm_rope_mean(const NormRopeMeanArguments& a, const Context& context) {
  NormRopeMeanProblem p{};
  p.rows = problem_of(a.rows);
  p.mean = a.mean.as<float>(), p.block = a.block;
  for (int i = 0; i < 3; ++i) p.mean_strides[i] = a.mean.strides[i];
  if (a.similarity.present()) {
    p.similarity = a.similarity.as<float>();
    for (int i = 0; i < 3; ++i) p.similarity_strides[i] = a.similarity.strides[i];
  }
  const int heads = p.similarity != nullptr ? kHeadsOf<true> : kHeadsOf<false>;
  const dim3 grid(static_cast<unsigned>(a.mean.size(1)), (p.rows.heads + heads - 1) / heads,
                  static_cast<unsigned>(a.mean.size(0)));
  const auto stream = static_cast<cudaStream_t>(context.stream);
  with_half_type(a.rows.x.dtype, "x", [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    with_lanes(p.rows.dim, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      if (p.similarity != nullptr) {
        norm_rope_mean_kernel<Element, kLanes, true><<<grid, kThreads, 0, stream>>>(p);
      } else {
        norm_rope_mean_kernel<Element, kLanes, false><<<grid, kThreads, 0, stream>>>(p);
      }
    });
  });
  check_cuda(cudaGetLastError(), "norm_rope_mean_kernel");
}

}  // namespace flashomni::cuda
