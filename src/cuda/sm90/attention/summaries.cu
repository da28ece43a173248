// Block means in the kernel's own type, so that they can be walked as keys and values are.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "src/cuda/sm90/attention/summaries.h"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {
namespace {

template <class Element>
__global__ void convert(const float* from, Element* to, int64_t batch_stride, int64_t block_stride,
                        int64_t head_stride, int blocks, int heads, int columns) {
  const int64_t row = blockIdx.x;  // (batch, block, head)
  const int head = row % heads, block = row / heads % blocks;
  const int64_t batch = row / heads / blocks;
  const float* source = from + batch * batch_stride + block * block_stride + head * head_stride;
  for (int c = threadIdx.x; c < columns; c += blockDim.x) to[row * columns + c] = Element(source[c]);
}

}  // namespace

void convert_summaries(const TensorView& mean, DType dtype, void* to, cudaStream_t stream) {
  const int64_t rows = mean.size(0) * mean.size(1) * mean.size(2);
  const int blocks = mean.size(1), heads = mean.size(2), columns = mean.size(3);
  const auto launch = [&](auto* out) {
    convert<<<static_cast<unsigned>(rows), 64, 0, stream>>>(mean.as<const float>(), out, mean.strides[0],
                                                            mean.strides[1], mean.strides[2], blocks, heads, columns);
  };
  if (dtype == DType::kFloat16)
    launch(static_cast<__half*>(to));
  else
    launch(static_cast<__nv_bfloat16*>(to));
  check_cuda(cudaGetLastError(), "convert_summaries");
}

}  // namespace flashomni::cuda::sm90
