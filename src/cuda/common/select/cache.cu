// The vision blocks with the smallest share in what vision gives to the text and takes from it, up to tau_q.
//
// A CTA a head. Nearly all time is latency: loads and sums depend on each other as little as they can. Each
// block adds up by itself the shares of those that come before it in the order of (share, index): no sort,
// and no thread waits for another.
#include <algorithm>

#include "src/cuda/common/chain.cuh"
#include "src/cuda/common/select/problem.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kMostThreads = 512;

template <int kUnit>
__host__ __device__ int64_t padded(int count) {
  return (int64_t(count) + kUnit - 1) / kUnit * kUnit;
}

/// Of all vision blocks.
struct Totals {
  double given = 0, taken = 0;
};

/// Each thread's added up over the CTA; every thread has the result. Called once.
__device__ Totals total_of_all(Totals own) {
  __shared__ double parts[kMostThreads / 32][2];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    own.given += __shfl_xor_sync(kWholeWarp, own.given, distance);
    own.taken += __shfl_xor_sync(kWholeWarp, own.taken, distance);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][0] = own.given, parts[threadIdx.x / 32][1] = own.taken;
  __syncthreads();
  Totals sum;
#pragma unroll 4
  for (int warp = 0; warp < blockDim.x / 32; ++warp) sum.given += parts[warp][0], sum.taken += parts[warp][1];
  return sum;
}

/// What a softmax over the vision blocks of each text column needs; a warp a column.
struct Columns {
  double* inverse;  // of the sum, [text_kv]; 0 where no score is finite
  float* peak;      // [text_kv]

  /// This lane's scores of a column; the lowest for blocks of text. Four are read at a time.
  template <class F>
  __device__ static void each(const SelectProblem& p, const float* x, F&& f) {
    constexpr int kAtATime = 4;
#pragma unroll 1
    for (int first = threadIdx.x % 32; first < p.q_blocks; first += kAtATime * 32) {
      float score[kAtATime];
#pragma unroll
      for (int u = 0; u < kAtATime; ++u) {
        const int i = first + u * 32;
        score[u] = i < p.q_blocks && !p.is_text_q(i) ? x[i] : -INFINITY;
      }
#pragma unroll
      for (int u = 0; u < kAtATime; ++u) f(finite_or_lowest(score[u]));
    }
  }
  /// The last warps first: meanwhile the first ones read what their blocks give.
  __device__ void measure(const SelectProblem& p, const float* scores) const {
    const int warps = blockDim.x / 32;
#pragma unroll 1
    for (int column = warps - 1 - threadIdx.x / 32; column < p.text_kv(); column += warps) {
      const float* x = scores + int64_t(column) * p.q_blocks;
      float most = -INFINITY;
      each(p, x, [&](float score) { most = fmaxf(most, score); });
      most = maximum<32>(most);
      const bool any = most > -INFINITY;
      if (!any) most = 0;
      double sum = 0;
      each(p, x, [&](float score) { sum += expf(score - most); });
      sum = total<32>(sum);
      if (threadIdx.x % 32 == 0) peak[column] = most, inverse[column] = any ? 1.0 / sum : 0;
    }
  }
  /// G: what vision block i takes from the text.
  __device__ float taken(const SelectProblem& p, const float* scores, int i) const {
    float sum = 0;
#pragma unroll 4
    for (int column = 0; column < p.text_kv(); ++column) {
      const float score = finite_or_lowest(scores[int64_t(column) * p.q_blocks + i]);
      sum += static_cast<float>(expf(score - peak[column]) * inverse[column]);
    }
    return sum;
  }
};

/// C: what the text takes from vision block i.
__device__ float given(const SelectProblem& p, const float* text_rows, int i) {
  const int first = i * p.kv_blocks_a_q_block, last = min(first + p.kv_blocks_a_q_block, p.kv_blocks);
  float sum = 0;
#pragma unroll 1
  for (int j = first; j < last; ++j) {
#pragma unroll 4
    for (int row = 0; row < p.text_q(); ++row) sum += text_rows[int64_t(row) * p.kv_blocks + j];
  }
  return sum;
}

/// Shares of the vision blocks, in shared memory, infinite for blocks of text and up to a multiple of four;
/// `scratch` holds as many floats.
__device__ void measure_shares(const SelectProblem& p, int64_t of_head, const Columns& columns, float* share,
                               float* scratch) {
  const float* scores = p.text_columns + of_head * p.text_kv() * p.q_blocks;
  const float* text_rows = p.text_rows + of_head * p.text_q() * p.kv_blocks;
  columns.measure(p, scores);
  Totals all;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.q_blocks; i += blockDim.x)
    all.given += share[i] = p.is_text_q(i) ? 0 : given(p, text_rows, i);
  __syncthreads();  // the columns are measured
#pragma unroll 1
  for (int i = threadIdx.x; i < p.q_blocks; i += blockDim.x)
    all.taken += scratch[i] = p.is_text_q(i) ? 0 : columns.taken(p, scores, i);
  all = total_of_all(all);
  if (!(all.given > 0)) all.given = 1;  // what each gives is 0
  if (!(all.taken > 0)) all.taken = 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < padded<4>(p.q_blocks); i += blockDim.x) {
    const bool vision = i < p.q_blocks && !p.is_text_q(i);
    share[i] = vision ? static_cast<float>(0.5 * (share[i] / all.given + scratch[i] / all.taken)) : INFINITY;
  }
  __syncthreads();
}

/// Whether the shares up to vision block i, itself included, add up to at most `limit`.
__device__ bool is_cached(const SelectProblem& p, const float* share, int i, double limit) {
  const float own = share[i];
  double mass[4] = {};  // four sums: none waits for the one before
#pragma unroll 2
  for (int j = 0; j < p.q_blocks; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(share + j);
    const float shares[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (shares[u] < own || (shares[u] == own && j + u <= i)) mass[u] += shares[u];
  }
  return (mass[0] + mass[1]) + (mass[2] + mass[3]) <= limit;
}

__global__ void __launch_bounds__(kMostThreads) cache_kernel(const __grid_constant__ SelectProblem p) {
  let_next_start();
  wait_for_previous();
  extern __shared__ __align__(16) double memory[];
  // Each part begins at a multiple of 16 bytes, for wide reads.
  const Columns columns{memory, reinterpret_cast<float*>(memory + padded<2>(p.text_kv()))};
  float *share = columns.peak + padded<4>(p.text_kv()), *scratch = share + padded<4>(p.q_blocks);
  const int head = blockIdx.x, batch = blockIdx.y;
  const int64_t of_head = int64_t(batch) * p.heads + head;
  const float ramp = p.ramp_value();
  if (p.caches) measure_shares(p, of_head, columns, share, scratch);
  const float tau = ramped(p.tau_q, ramp);
  const bool chooses = p.caches && tau > 0;
  uint8_t* active = p.active + batch * p.tiles() + head;
  int count = 0;
#pragma unroll 1
  for (int first = 0; first < p.q_blocks; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const bool computes =
        i < p.q_blocks && (!chooses || p.is_text_q(i) || !is_cached(p, share, i, limit_of(tau)));
    if (i < p.q_blocks) active[int64_t(i) * p.heads] = computes;
    count += __syncthreads_count(computes);
  }
  if (threadIdx.x == 0) p.counts[of_head] = count;
}

}  // namespace

int cache_shared_bytes(const SelectProblem& p) {
  const int64_t bytes =
      p.caches ? padded<2>(p.text_kv()) * 8 + padded<4>(p.text_kv()) * 4 + padded<4>(p.q_blocks) * 8 : 0;
  return static_cast<int>(std::min<int64_t>(bytes, INT32_MAX));
}

void launch_cache(const SelectProblem& p, int device, cudaStream_t stream) {
  const int most = most_shared_bytes(device);
  static PerDevice configured;
  configured.once(device, [most] {
    check_cuda(cudaFuncSetAttribute(cache_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               "cache_kernel's shared memory");
  });
  const int threads = p.q_blocks <= 128 ? 256 : kMostThreads;  // some for rows, some for columns
  launch_next(cache_kernel, "cache_kernel", p, dim3(p.heads, p.batch), threads, cache_shared_bytes(p), device,
              stream);
}

}  // namespace flashomni::cuda
