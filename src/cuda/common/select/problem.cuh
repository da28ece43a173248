// What the three kernels of the selection share: the problem, and what each leaves in the workspace for the
// next.
//
//   skip_kernel    scores and softmax of each row; kept[tile]: its KV blocks, as if the tile were active
//                  (skip_short_kernel where rows are short)
//   cache_kernel   what each vision block gives to and takes from the text; active[tile], counts[batch, head]
//   pack_kernel    S_q, then the bits
// tile = q_block * heads + head, within a batch element. The first two let the next start early; the last
// does not, as CTAs of what follows would take the SMs from those that still compute.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashomni::cuda {

struct SelectProblem {
  const float *q_mean, *k_mean;
  int64_t q_strides[3], k_strides[3];  // batch, block, head
  const float* ramp;                   // scales both taus; null: 1
  const float* k_similarity;           // null: no KV block is guarded
  int64_t similarity_strides[3];       // batch, block, head
  float self_similarity;               // what it must exceed
  float tau_q, tau_kv, s_q, scale;
  int batch, heads, heads_a_kv_head, dim, q_blocks, kv_blocks;
  int kv_blocks_a_q_block;
  int text_q_begin, text_q_end, text_kv_begin, text_kv_end;  // blocks that hold text
  bool caches;                                               // there is text to judge by, and tau_q

  uint8_t* kept;        // [batch][tiles][kept_bytes()]
  float* text_rows;     // [batch][heads][text_q][kv_blocks]: their softmax
  float* text_columns;  // [batch][heads][text_kv][q_blocks]: scores
  uint8_t* active;      // [batch][tiles]
  int* counts;          // [batch][heads]: active tiles

  uint8_t *cache_bits, *skip_bits;
  int64_t cache_stride, skip_stride, cache_bytes, skip_bytes;  // of a batch element

  __host__ __device__ int text_q() const { return text_q_end - text_q_begin; }
  __host__ __device__ int text_kv() const { return text_kv_end - text_kv_begin; }
  __host__ __device__ int64_t tiles() const { return int64_t(q_blocks) * heads; }
  /// Bytes of a row in `kept`: one more than its bits fill, so that eight bits from anywhere lie in two bytes.
  __host__ __device__ int kept_bytes() const { return (kv_blocks + 7) / 8 + 1; }
  __device__ bool is_text_q(int i) const { return i >= text_q_begin && i < text_q_end; }
  __device__ bool is_text_kv(int j) const { return j >= text_kv_begin && j < text_kv_end; }
  /// Of the tokens of KV block j; infinite where none is given.
  __device__ float similarity(int of_batch, int of_head, int j) const {
    if (k_similarity == nullptr) return INFINITY;
    const float* of_pair =
        k_similarity + of_batch * similarity_strides[0] + of_head / heads_a_kv_head * similarity_strides[2];
    return of_pair[j * similarity_strides[1]];
  }
  /// Whether the mean of a block of this similarity does not stand for its tokens. What is no number is not
  /// above the threshold.
  __device__ bool is_guarded(float of_block) const { return !(of_block > self_similarity); }
  /// The ramp's value, to be read long before it is needed.
  __device__ float ramp_value() const { return ramp == nullptr ? 1.0f : *ramp; }
};

/// A threshold with the ramp applied; whatever the ramp holds, one in [0, 1].
__device__ inline float ramped(float tau, float ramp) {
  return fminf(fmaxf(tau * ramp, 0.0f), 1.0f);
}

/// What a cumulative share may reach. At 1 it is all of it, though rounded shares may add up to a little more.
__device__ inline double limit_of(float tau) {
  return tau >= 1 ? static_cast<double>(INFINITY) : static_cast<double>(tau);
}

inline constexpr unsigned kWholeWarp = ~0u;

/// Over groups of kLanes neighbouring lanes; every lane has the result. All lanes of the warp take part.
template <int kLanes, class Value, class Operation>
__device__ inline Value reduce(Value value, Operation operation) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    value = operation(value, __shfl_xor_sync(kWholeWarp, value, distance));
  return value;
}
/// Integers in the order of the floats, NaN aside, and back: its own inverse.
__device__ inline int in_order(int bits) {
  return bits ^ (bits >> 31 & 0x7fffffff);
}
/// Of numbers: no value is NaN.
template <int kLanes>
__device__ inline float maximum(float value) {
  if constexpr (kLanes == 32) {  // one instruction, for integers
    return __int_as_float(in_order(__reduce_max_sync(kWholeWarp, in_order(__float_as_int(value)))));
  } else {
    return reduce<kLanes>(value, [](float a, float b) { return fmaxf(a, b); });
  }
}
template <int kLanes, class Value>
__device__ inline Value total(Value value) {
  return reduce<kLanes>(value, [](Value a, Value b) { return a + b; });
}

/// A score as softmaxes see it: what is not finite counts as the lowest.
__device__ inline float finite_or_lowest(float score) {
  return isfinite(score) ? score : -INFINITY;
}

/// Shared memory that a CTA needs at the least.
int skip_shared_bytes(const SelectProblem& problem);
int cache_shared_bytes(const SelectProblem& problem);

void launch_skip(const SelectProblem& problem, int device, cudaStream_t stream);
void launch_cache(const SelectProblem& problem, int device, cudaStream_t stream);
void launch_pack(const SelectProblem& problem, int device, cudaStream_t stream);

/// The most shared memory that a block of `device` may ask for.
int most_shared_bytes(int device);

}  // namespace flashomni::cuda
