// The kernel: roles of the warps, and its launch.
#pragma once

#include "src/cuda/sm90/attention/consumer.cuh"
#include "src/cuda/sm90/attention/loader.cuh"
#include "src/cuda/sm90/attention/manager.cuh"
#include "flashomni/tensor.h"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    attention_kernel(const __grid_constant__ AttentionParameters p) {
  // Declared so, not aligned by hand: the compiler keeps the address space, and accesses stay LDS/STS.
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(raw);
  if (threadIdx.x == 0) {
    shared.tiles.init(32, 1 + Config::kConsumerWarps);
    for (uint64_t& query : shared.queries) ::cuda::ptx::mbarrier_init(&query, 1);
    shared.blocks.init(1, Config::kConsumerWarps);
    shared.masks.init(32, 32 * Config::kConsumerWarps);
    ::cuda::ptx::mbarrier_init(&shared.landing, 1);
    shared.near_end = 0;
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v, &p.out}) ptx_ops::prefetch_tensor_map(map);
  }
  __syncthreads();
  cudaGridDependencySynchronize();  // the plan's list, and all that came before it

  const int warp = __shfl_sync(ptx_ops::kWholeWarp, threadIdx.x / 32, 0);
  if (warp < Config::kConsumerWarps) {
    if constexpr (Config::kMovesRegisters) ptx_ops::grow_registers<Config::kConsumerRegisters>();
    Consumer<Config>(shared, p, warp / 4).run();
  } else {
    if constexpr (Config::kMovesRegisters) ptx_ops::shrink_registers<Config::kProducerRegisters>();
    if (warp == Config::kConsumerWarps) Manager<Config>(shared, p).run();
    if (warp == Config::kConsumerWarps + 1) Loader<Config>(shared, p).run();
  }
}

/// Launches on every SM of `device`, early: the kernel itself waits for the plan before it.
template <class Config>
void launch_attention(const AttentionParameters& p, int device, cudaStream_t stream) {
  static PerDevice configured;
  configured.once(device, [] {
    check_cuda(cudaFuncSetAttribute(attention_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Config::kSharedBytes),
               "attention_kernel's shared memory");
  });
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = multiprocessors(device) * Config::kCtas;
  config.blockDim = Config::kThreads;
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = &early, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, attention_kernel<Config>, p), "attention_kernel");
}

template <int kHeadDim>
void launch_head_dim(const AttentionParameters& p, DType dtype, int block_q, int device, cudaStream_t stream) {
  const bool half = dtype == DType::kFloat16, pair = block_q == 128;
  if (pair && half) return launch_attention<AttentionConfig<__half, kHeadDim, 2>>(p, device, stream);
  if (pair) return launch_attention<AttentionConfig<__nv_bfloat16, kHeadDim, 2>>(p, device, stream);
  if (half) return launch_attention<AttentionConfig<__half, kHeadDim, 1>>(p, device, stream);
  return launch_attention<AttentionConfig<__nv_bfloat16, kHeadDim, 1>>(p, device, stream);
}

}  // namespace flashomni::cuda::sm90
