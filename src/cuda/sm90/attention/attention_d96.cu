// The kernels of head_dim 96 (one file a head_dim: they compile side by side).
#include "src/cuda/sm90/attention/kernel.cuh"
#include "src/cuda/sm90/attention/kernels.h"

namespace flashomni::cuda::sm90 {

template void launch_head_dim<96>(const AttentionParameters&, DType, int, int, cudaStream_t);

}  // namespace flashomni::cuda::sm90
