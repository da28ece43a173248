#include "src/cuda/sm90/gemm/counter.h"

#include "src/cuda/common/chain.cuh"

namespace flashomni::cuda::sm90 {
namespace {

__global__ void reset_kernel(int* counter) {
  let_next_start();
  wait_for_previous();
  *counter = 0;
}

}  // namespace

int* zero_counter(const Context& context, int device) {
  if (context.counter != nullptr) return context.counter;
  auto* counter = static_cast<int*>(context.workspace);
  launch_next(reset_kernel, "reset_kernel", counter, dim3(1), 1, 0, device,
              static_cast<cudaStream_t>(context.stream));
  return counter;
}

}  // namespace flashomni::cuda::sm90
