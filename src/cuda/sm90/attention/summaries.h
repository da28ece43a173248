// Block means in the kernel's own type.
#pragma once

#include <cuda_runtime.h>

#include "flashomni/tensor.h"

namespace flashomni::cuda::sm90 {

/// Rounds `mean` (float32 [B, kv_blocks, Hkv, D]) to `dtype` at `to`, contiguous.
void convert_summaries(const TensorView& mean, DType dtype, void* to, cudaStream_t stream);

}  // namespace flashomni::cuda::sm90
