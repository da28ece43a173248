// Sums over the lanes of a warp, and over the warps that share a row.
#pragma once

#include <cuda_runtime.h>

namespace flashomni::cuda {

inline constexpr int kWarp = 32;

/// Over a group of lanes; every lane has the result. All lanes of the warp take part.
template <int kLanes>
__device__ inline float sum_of_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

/// Over the row's threads, whole warps along x; every one has the result. Several warps are a CTA of their own
/// and add up in `sums`, which nobody else uses.
__device__ inline float sum_of_row(float value, float* sums) {
  value = sum_of_lanes<kWarp>(value);
  if (blockDim.x == kWarp) return value;
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) value += sums[warp];
  return value;
}

}  // namespace flashomni::cuda
