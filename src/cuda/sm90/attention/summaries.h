// Block means in the kernel's own type.
#pragma once

#include <cuda_runtime.h>

#include "flashomni/tensor.h"

namespace flashomni::cuda::sm90 {

/// Rounds both means (float32 [B, kv_blocks, Hkv, D]) to `dtype` at `keys` and `values`, contiguous: one
/// launch.
void convert_summaries(const TensorView& k_mean, const TensorView& v_mean, DType dtype, void* keys,
                       void* values, cudaStream_t stream);

}  // namespace flashomni::cuda::sm90
