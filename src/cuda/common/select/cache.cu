// The vision blocks with the smallest share in what vision gives to the text and takes from it, up to tau_q.
//
// A CTA a head. Each block adds up by itself the shares of those that come before it in the order of (share,
// index): no sort, and no thread waits for another.
#include <algorithm>

#include "src/cuda/common/chain.cuh"
#include "src/cuda/common/select/problem.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

template <int kUnit>
__host__ __device__ int64_t padded(int count) {
  return (int64_t(count) + kUnit - 1) / kUnit * kUnit;
}

/// Over the whole CTA; every thread has the result.
__device__ double total_of_all(double value) {
  __shared__ double parts[kWarps];
  value = total<32>(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp];
  return sum;
}

/// What a softmax over the vision blocks of each text column needs; a warp a column.
struct Columns {
  double* inverse;  // of the sum, [text_kv]; 0 where no score is finite
  float* peak;      // [text_kv]

  __device__ void measure(const SelectProblem& p, const float* scores) const {
    const int lane = threadIdx.x % 32;
    for (int column = threadIdx.x / 32; column < p.text_kv(); column += kWarps) {
      const float* x = scores + int64_t(column) * p.q_blocks;
      float most = -INFINITY;
      for (int i = lane; i < p.q_blocks; i += 32)
        if (!p.is_text_q(i)) most = fmaxf(most, finite_or_lowest(x[i]));
      most = maximum<32>(most);
      const bool any = most > -INFINITY;
      double sum = 0;
      for (int i = lane; i < p.q_blocks; i += 32)
        if (any && !p.is_text_q(i)) sum += expf(finite_or_lowest(x[i]) - most);
      sum = total<32>(sum);
      if (lane == 0) peak[column] = any ? most : 0, inverse[column] = any ? 1.0 / sum : 0;
    }
  }
  /// G: what vision block i takes from the text.
  __device__ float taken(const SelectProblem& p, const float* scores, int i) const {
    float sum = 0;
    for (int column = 0; column < p.text_kv(); ++column) {
      const float score = finite_or_lowest(scores[int64_t(column) * p.q_blocks + i]);
      if (inverse[column] > 0) sum += static_cast<float>(expf(score - peak[column]) * inverse[column]);
    }
    return sum;
  }
};

/// C: what the text takes from vision block i.
__device__ float given(const SelectProblem& p, const float* text_rows, int i) {
  const int first = i * p.kv_blocks_a_q_block, last = min(first + p.kv_blocks_a_q_block, p.kv_blocks);
  float sum = 0;
  for (int row = 0; row < p.text_q(); ++row)
    for (int j = first; j < last; ++j) sum += text_rows[int64_t(row) * p.kv_blocks + j];
  return sum;
}

/// Shares of the vision blocks, in shared memory; `scratch` holds as many floats.
__device__ void measure_shares(const SelectProblem& p, int64_t of_head, const Columns& columns, float* share,
                               float* scratch) {
  const float* scores = p.text_columns + of_head * p.text_kv() * p.q_blocks;
  const float* text_rows = p.text_rows + of_head * p.text_q() * p.kv_blocks;
  columns.measure(p, scores);
  __syncthreads();
  double all_given = 0, all_taken = 0;
  for (int i = threadIdx.x; i < p.q_blocks; i += kThreads) {
    const bool vision = !p.is_text_q(i);
    all_given += share[i] = vision ? given(p, text_rows, i) : 0;
    all_taken += scratch[i] = vision ? columns.taken(p, scores, i) : 0;
  }
  all_given = total_of_all(all_given), all_taken = total_of_all(all_taken);
  for (int i = threadIdx.x; i < p.q_blocks; i += kThreads) {
    const double gives = all_given > 0 ? share[i] / all_given : 0, takes = all_taken > 0 ? scratch[i] / all_taken : 0;
    share[i] = static_cast<float>(0.5 * (gives + takes));
  }
  __syncthreads();
}

/// Whether the shares up to block i, itself included, add up to at most `limit`.
__device__ bool is_cached(const SelectProblem& p, const float* share, int i, double limit) {
  const float own = share[i];
  double mass = 0;
  for (int j = 0; j < p.q_blocks; ++j) {
    const bool before = share[j] < own || (share[j] == own && j <= i);
    if (before && !p.is_text_q(j)) mass += share[j];
  }
  return mass <= limit;
}

__global__ void __launch_bounds__(kThreads) cache_kernel(const __grid_constant__ SelectProblem p) {
  let_next_start();
  wait_for_previous();
  extern __shared__ double memory[];
  // Each part begins at a multiple of 16 bytes: wide reads of one do not touch the next.
  const Columns columns{memory, reinterpret_cast<float*>(memory + padded<2>(p.text_kv()))};
  float *share = columns.peak + padded<4>(p.text_kv()), *scratch = share + padded<4>(p.q_blocks);
  const int head = blockIdx.x, batch = blockIdx.y;
  const int64_t of_head = int64_t(batch) * p.heads + head;
  const float tau = p.ramped(p.tau_q);
  const bool chooses = p.caches && tau > 0;
  if (chooses) measure_shares(p, of_head, columns, share, scratch);
  uint8_t* active = p.active + batch * p.tiles() + head;
  int count = 0;
  for (int i = threadIdx.x; i < p.q_blocks; i += kThreads) {
    const bool computes = !chooses || p.is_text_q(i) || !is_cached(p, share, i, limit_of(tau));
    active[int64_t(i) * p.heads] = computes;
    count += computes;
  }
  const double all = total_of_all(count);
  if (threadIdx.x == 0) p.counts[of_head] = static_cast<int>(all);
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
  launch_next(cache_kernel, "cache_kernel", p, dim3(p.heads, p.batch), kThreads, cache_shared_bytes(p), device,
              stream);
}

}  // namespace flashomni::cuda
