// Kernels of one operator in a chain: each is set up while the one before it still runs, where the chip can
// (compute capability 9.0), and waits for its results on the device.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/common/launch.h"

namespace flashomni::cuda {

/// Lets the next kernel of the chain be set up.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// Waits until the kernel before has ended and its writes are seen. To come before any read or write of memory
/// that it touches.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// Launches a kernel that begins with wait_for_previous().
template <class Argument>
void launch_next(void (*kernel)(Argument), const char* name, const Argument& argument, dim3 grid, int threads,
                 int shared_bytes, int device, cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = device_attribute<cudaDevAttrComputeCapabilityMajor>(device) >= 9 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, argument), name);
}

}  // namespace flashomni::cuda
