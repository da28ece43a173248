// Norm, RoPE, block means and block self-similarities in one read of q or k; also block_mean with similarities,
// which changes nothing.
//
// A CTA a (block of tokens, some heads): groups of lanes take the block's rows in turns, as norm_rope's do, and each
// thread adds up what it sees of a head; then these sums are added up. Means are of what is stored, so of rounded
// values.
#include "src/cuda/common/launch.h"
#include "src/cuda/common/norm_rope.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256;

struct NormRopeMeanProblem {
  NormRopeProblem rows;
  float *mean, *similarity;  // similarity may be null
  int64_t mean_strides[3], similarity_strides[3];  // batch, block, head
  int block;
};

/// Sums of one head over the rows that each thread has seen, in two halves of a run, so that neighbouring threads
/// have neighbouring float4s. In shared memory: in registers they left room for two CTAs an SM, too few for the
/// memory.
struct Sums {
  float4 half[2][kThreads];

  __device__ void clear() { half[0][threadIdx.x] = half[1][threadIdx.x] = {0, 0, 0, 0}; }
  __device__ void add(const float (&values)[kRun], float factor) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float4& sum = half[i][threadIdx.x];
      sum = {sum.x + factor * values[4 * i], sum.y + factor * values[4 * i + 1], sum.z + factor * values[4 * i + 2],
             sum.w + factor * values[4 * i + 3]};
    }
  }
  /// Of one column, over the CTA's groups of lanes, always in the same order.
  template <int kLanes>
  __device__ float total(int column) const {
    const float* of = reinterpret_cast<const float*>(half[column % kRun / 4]) + column % 4;
    float sum = 0;
#pragma unroll 8
    for (int thread = column / kRun; thread < kThreads; thread += kLanes) sum += of[4 * thread];
    return sum;
  }
};

/// kHeads: of a CTA; the rotation is read once for them.
template <class Element, int kLanes, int kHeads, bool kSimilarity>
__global__ void __launch_bounds__(kThreads, kHeads == 2 && !kSimilarity ? 4 : 3) norm_rope_mean_kernel(const __grid_constant__ NormRopeMeanProblem q) {
  __shared__ Sums sums[kHeads], units[kSimilarity ? kHeads : 1];
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
  for (int h = 0; h < kHeads; ++h) {
    sums[h].clear();
    if constexpr (kSimilarity) units[h].clear();
  }

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
      sums[h].add(values, 1.0f);
      if constexpr (kSimilarity) {
        const float squares = sum_of_squares<kLanes>(values);
        units[h].add(values, squares > 0 ? 1.0f / sqrtf(squares) : 0.0f);
      }
    }
  }
  __syncthreads();

  float* mean = q.mean + batch * q.mean_strides[0] + blockIdx.x * q.mean_strides[1];
  for (int at = threadIdx.x; at < heads * p.dim; at += kThreads) {
    const int h = at / p.dim, d = at % p.dim;
    mean[(first_head + h) * q.mean_strides[2] + d] = sums[h].template total<kLanes>(d) / static_cast<float>(rows);
  }
  if constexpr (kSimilarity) {
    const int h = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (h >= heads) return;
    float squares = 0;
    for (int d = lane; d < p.dim; d += 32) {
      const float total = units[h].template total<kLanes>(d);
      squares += total * total;
    }
    squares = sum_of_lanes<32>(squares);
    if (lane == 0) {
      q.similarity[batch * q.similarity_strides[0] + blockIdx.x * q.similarity_strides[1] +
                   (first_head + h) * q.similarity_strides[2]] = squares / static_cast<float>(rows * rows);
    }
  }
}

}  // namespace

void norm_rope_mean(const NormRopeMeanArguments& a, const Context& context) {
  NormRopeMeanProblem p{};
  p.rows = problem_of(a.rows, a.rows.x, a.rows.weight, a.rows.cache);
  p.mean = a.mean.as<float>(), p.block = a.block;
  for (int i = 0; i < 3; ++i) p.mean_strides[i] = a.mean.strides[i];
  if (a.similarity.present()) {
    p.similarity = a.similarity.as<float>();
    for (int i = 0; i < 3; ++i) p.similarity_strides[i] = a.similarity.strides[i];
  }
  const int64_t blocks = a.mean.size(0) * a.mean.size(1);
  const auto grid_of = [&](int heads) {
    return dim3(static_cast<unsigned>(a.mean.size(1)), (p.rows.heads + heads - 1) / heads,
                static_cast<unsigned>(a.mean.size(0)));
  };
  // Four heads read the rotation least; where their CTAs are few, two keep the chip busier.
  const bool few = blocks * ((p.rows.heads + 3) / 4) < 4 * multiprocessors(a.rows.x.device.id);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  with_half_type(a.rows.x.dtype, "x", [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    with_lanes(p.rows.dim, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      if (p.similarity != nullptr) {
        norm_rope_mean_kernel<Element, kLanes, 2, true><<<grid_of(2), kThreads, 0, stream>>>(p);
      } else if (few) {
        norm_rope_mean_kernel<Element, kLanes, 2, false><<<grid_of(2), kThreads, 0, stream>>>(p);
      } else {
        norm_rope_mean_kernel<Element, kLanes, 4, false><<<grid_of(4), kThreads, 0, stream>>>(p);
      }
    });
  });
  check_cuda(cudaGetLastError(), "norm_rope_mean_kernel");
}

}  // namespace flashomni::cuda
