// Online softmax with a lazy maximum, over the accumulator fragment of m64nN: a thread holds columns
// 8j + 2 (lane % 4) + {0, 1} of the two rows lane / 4 and lane / 4 + 8, as s[4 j + {0, 1}] and s[4 j + {2, 3}].
//
// Softmax does not care which shift it subtracts, only that nothing overflows. The shift is the row maximum of
// a tile's first step and stays until a step's sum of exponentials passes kLimit; then it is raised, and sum
// and output are rescaled. So the common step needs no maximum, no shuffle and no rescaling. Steps of a tile
// without a whole block always take the maximum: a row may see nothing of them, and its shift is then -inf until
// it sees something.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/matrix.cuh"

namespace flashomni::cuda::sm90 {

template <int kCount>
__device__ inline void scale_rows(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[i % 4 / 2];
}

template <class Element>
struct LazySoftmax {
  // Probabilities reach the limit before they are rounded to Element: fp16 ends at 65504.
  static constexpr float kLimit = std::is_same_v<Element, __half> ? 0x1p15f : 0x1p40f;
  float shift[2];    // in units of log2: exp2(s * scale - shift)
  float row_sum[2];  // this thread's share until finish()

  /// A step's sums of exponentials, this thread's share.
  struct Sums {
    float of[2];
    __device__ bool outgrown() const {  // true for NaN too
      return __any_sync(ptx_ops::kWholeWarp, !(fmaxf(of[0], of[1]) <= kLimit));
    }
    // ptxas hoists a wait for a product above arithmetic that does not need it, which would put the softmax
    // after the product instead of under it. A branch that needs the sums, never taken, holds it back.
    __device__ void complete_here() const {
      if (of[0] + of[1] < 0) __trap();
    }
  };

  template <int kCount>
  __device__ void start(const float (&s)[kCount], float scale) {
    row_maximum(s, shift);
    shift[0] *= scale, shift[1] *= scale;
    row_sum[0] = row_sum[1] = 0;
  }

  /// The accumulator fragment of the scores, rounded, is the A fragment of the next product. The scores are
  /// kept. kMasked: a shift of -inf gives probabilities of 0; otherwise a sum of inf, which asks for raise().
  template <bool kMasked, int kSteps>
  __device__ Sums exponentiate(const float (&s)[8 * kSteps], float scale, uint32_t (&p)[kSteps][4]) {
    return exponentiate<kMasked>(s, scale, p, nullptr);
  }
  /// The same of scores to which terms(j) is added, in units of log2, in columns 8 j + 2 (lane % 4) + {0, 1}.
  template <bool kMasked, int kSteps, class Terms>
  __device__ Sums exponentiate(const float (&s)[8 * kSteps], float scale, uint32_t (&p)[kSteps][4], Terms terms) {
    float sum[2][2] = {}, by[2] = {shift[0], shift[1]};
    if constexpr (kMasked) {
      if (by[0] == -INFINITY) by[0] = 0;
      if (by[1] == -INFINITY) by[1] = 0;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i % 2;
        float offset_x = -by[r], offset_y = -by[r];
        if constexpr (!std::is_null_pointer_v<Terms>) {
          const float2 pair = terms(2 * k + i / 2);
          offset_x = pair.x - by[r], offset_y = pair.y - by[r];
        }
        const float x = ptx_ops::exp2_approx(fmaf(s[8 * k + 2 * i], scale, offset_x));
        const float y = ptx_ops::exp2_approx(fmaf(s[8 * k + 2 * i + 1], scale, offset_y));
        sum[r][0] += x, sum[r][1] += y;
        p[k][i] = ptx_ops::pack<Element>(x, y);
      }
    return {sum[0][0] + sum[0][1], sum[1][0] + sum[1][1]};
  }
  __device__ void accept(const Sums& sums) { row_sum[0] += sums.of[0], row_sum[1] += sums.of[1]; }

  /// Raises the shift to these scores; earlier outputs must be multiplied by `factor`.
  template <int kCount>
  __device__ void raise(const float (&s)[kCount], float scale, float (&factor)[2]) {
    float top[2];
    row_maximum(s, top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float raised = fmaxf(shift[r], top[r] * scale);
      factor[r] = raised == shift[r] ? 1.0f : ptx_ops::exp2_approx(shift[r] - raised);
      shift[r] = raised;
      row_sum[r] *= factor[r];
    }
  }

  /// Completes the row sums across the four lanes that share a row.
  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(ptx_ops::kWholeWarp, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(ptx_ops::kWholeWarp, row_sum[r], 2);
    }
  }

 private:
  template <int kCount>
  __device__ static void row_maximum(const float (&s)[kCount], float (&top)[2]) {
    float m[4] = {s[0], s[1], s[2], s[3]};  // four chains: one warp a scheduler has to hide its own latency
#pragma unroll
    for (int i = 4; i < kCount; ++i) m[i % 4] = fmaxf(m[i % 4], s[i]);
    top[0] = fmaxf(m[0], m[1]), top[1] = fmaxf(m[2], m[3]);
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], __shfl_xor_sync(ptx_ops::kWholeWarp, top[r], step));
  }
};

}  // namespace flashomni::cuda::sm90
