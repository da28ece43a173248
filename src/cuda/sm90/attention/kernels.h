// The compiled kernels, by head_dim.
#pragma once

#include "flashomni/tensor.h"
#include "src/cuda/sm90/attention/config.cuh"

namespace flashomni::cuda::sm90 {

/// Launches the kernel for float16 or bfloat16 and query blocks of 128 or 64 rows.
template <int kHeadDim>
void launch_head_dim(const AttentionParameters& p, DType dtype, int block_q, int device, cudaStream_t stream);

}  // namespace flashomni::cuda::sm90
