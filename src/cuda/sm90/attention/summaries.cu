// Block means in the kernel's own type, so that they can be walked as keys and values are.
#include "src/cuda/sm90/attention/summaries.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "src/cuda/common/chain.cuh"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr int kThreads = 64;

struct Means {
  const float* from[2];  // of keys, of values
  void* to[2];
  int64_t strides[2][3];  // batch, block, head
  int blocks, heads, columns;
};

template <class Element>
__global__ void __launch_bounds__(kThreads) convert_kernel(const __grid_constant__ Means m) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x, batch = row / m.heads / m.blocks;  // (batch, block, head)
  const int head = row % m.heads, block = row / m.heads % m.blocks;
  const int64_t* strides = m.strides[blockIdx.y];
  const float* from = m.from[blockIdx.y] + batch * strides[0] + block * strides[1] + head * strides[2];
  Element* to = static_cast<Element*>(m.to[blockIdx.y]) + row * m.columns;
  for (int c = threadIdx.x; c < m.columns; c += kThreads) to[c] = Element(from[c]);
}

}  // namespace

void convert_summaries(const TensorView& k_mean, const TensorView& v_mean, DType dtype, void* keys, void* values,
                       cudaStream_t stream) {
  Means m{{k_mean.as<const float>(), v_mean.as<const float>()}, {keys, values}};
  for (int i = 0; i < 3; ++i) m.strides[0][i] = k_mean.strides[i], m.strides[1][i] = v_mean.strides[i];
  m.blocks = static_cast<int>(k_mean.size(1)), m.heads = static_cast<int>(k_mean.size(2));
  m.columns = static_cast<int>(k_mean.size(3));
  const dim3 grid(static_cast<unsigned>(k_mean.size(0) * m.blocks * m.heads), 2);
  const int device = k_mean.device.id;
  if (dtype == DType::kFloat16)
    launch_next(convert_kernel<__half>, "convert_kernel", m, grid, kThreads, 0, device, stream);
  else
    launch_next(convert_kernel<__nv_bfloat16>, "convert_kernel", m, grid, kThreads, 0, device, stream);
}

}  // namespace flashomni::cuda::sm90
