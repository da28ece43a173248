// The kernel of both GEMMs: roles of the warps, and its launch.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/tma.cuh"
#include "src/cuda/sm90/gemm/config.cuh"
#include "src/cuda/sm90/gemm/output.cuh"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {

/// Roles: a Config, Parameters, and the Scheduler, Loader, Storer and Consumer that work on its Shared.
template <class Roles>
__global__ void __launch_bounds__(GemmSizes::kThreads, 1)
    gemm_kernel(const __grid_constant__ typename Roles::Parameters p) {
  using Config = typename Roles::Config;
  // Declared so, not aligned by hand: the compiler keeps the address space, and accesses stay LDS/STS.
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(raw);
  if (threadIdx.x == 0) {
    shared.tiles.init(32, Config::kTileReaders);
    shared.stages.init(1, Config::kConsumerWarps);
    for (uint64_t& turn : shared.turn) ::cuda::ptx::mbarrier_init(&turn, 1);
    ::cuda::ptx::mbarrier_init(&shared.asked, 1);
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
  }
  cudaGridDependencySynchronize();  // the plan's list, and all that came before it
  Roles::prepare(shared, p);
  __syncthreads();

  const int warpgroup = __shfl_sync(ptx_ops::kWholeWarp, threadIdx.x / 128, 0);
  if (warpgroup == Config::kConsumers) {
    ptx_ops::shrink_registers<Config::kProducerRegisters>();
    const int warp = __shfl_sync(ptx_ops::kWholeWarp, threadIdx.x / 32, 0) - Config::kConsumerWarps;
    if (warp == 0) typename Roles::Scheduler(shared, p).run();
    if (warp == 1) typename Roles::Loader(shared, p).run();
    if (warp == 2) typename Roles::Storer(shared, p).run();
  } else {
    ptx_ops::grow_registers<Config::kConsumerRegisters>();
    typename Roles::Consumer(shared, p, warpgroup).run();
  }
}

/// Launches on every SM of `device`, early: the kernel itself waits for the plan before it.
template <class Roles>
void launch_gemm(const typename Roles::Parameters& p, int device, cudaStream_t stream) {
  using Config = typename Roles::Config;
  static PerDevice configured;
  configured.once(device, [] {
    check_cuda(cudaFuncSetAttribute(gemm_kernel<Roles>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Config::kSharedBytes),
               "gemm_kernel's shared memory");
  });
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = multiprocessors(device);
  config.blockDim = Config::kThreads;
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = &early, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, gemm_kernel<Roles>, p), "gemm_kernel");
}

/// Tells tiles to the other warps. A tile is claimed when the loader asks for it, not sooner: a CTA that held
/// several would keep them from CTAs that are free.
template <class Config>
struct GemmScheduler {
  using Shared = typename Config::Shared;
  Shared& shared;
  RingCursor<Config::kTileSlots> published;
  uint32_t asked_phase = 0;

  /// The next tile, once the loader is about to need it: the first round's have the CTAs' own numbers.
  __device__ int claim(int* counter) {
    ptx_ops::wait_parity_relaxed(shared.asked, asked_phase);
    asked_phase ^= 1;
    int claimed = 0;
    if (ptx_ops::lane_index() == 0) claimed = atomicAdd(counter, 1);
    return gridDim.x + __shfl_sync(ptx_ops::kWholeWarp, claimed, 0);
  }
  __device__ void hand_on() {
    ptx_ops::arrive(shared.tiles.full[published.slot()]);
    published.advance();
  }
};

/// Sends one consumer's output on its way after the other's: waits until it is staged, lets `copy` store it,
/// and hands the turn on when the staging buffer has been read.
template <class Config>
struct GemmStorer {
  using Shared = typename Config::Shared;
  Shared& shared;
  const bool leader = ptx_ops::elect_one();
  RingCursor<Config::kTileSlots> tiles;

  template <class Copy>
  __device__ void store_both(Copy copy) {
#pragma unroll
    for (int i = 0; i < Config::kConsumers; ++i) {
      ptx_ops::named_barrier_sync(kOutputStaged0 + i, Config::kStoreThreads);
      copy(i);
      __syncwarp();
      if (leader) {
        ::cuda::ptx::cp_async_bulk_commit_group();
        ::cuda::ptx::cp_async_bulk_wait_group_read(::cuda::ptx::n32_t<0>{});
        ptx_ops::arrive(shared.turn[1 - i]);
      }
      __syncwarp();
    }
  }
  __device__ void release_tile() {
    ptx_ops::arrive(shared.tiles.empty[tiles.slot()]);
    tiles.advance();
  }
  __device__ void finish() {
    if (leader) ::cuda::ptx::cp_async_bulk_wait_group(::cuda::ptx::n32_t<0>{});
  }
};

}  // namespace flashomni::cuda::sm90
