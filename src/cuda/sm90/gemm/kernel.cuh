// The kernel of both GEMMs: roles of the warps, and its launch.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/ptx/cluster.cuh"
#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/tma.cuh"
#include "src/cuda/sm90/gemm/config.cuh"
#include "src/cuda/sm90/gemm/output.cuh"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {

/// Roles: a Config, Parameters, and the Scheduler, Loader, Storer and Consumer that work on its Shared;
/// prefetch_maps(), before anything else, by one thread; prepare(), when what came before has ended, by all.
template <class Roles>
__global__ void __launch_bounds__(GemmSizes::kThreads, 1)
    gemm_kernel(const __grid_constant__ typename Roles::Parameters p) {
  using Config = typename Roles::Config;
  // Declared so, not aligned by hand: the compiler keeps the address space, and accesses stay LDS/STS.
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(raw);
  if (threadIdx.x == 0) {
    shared.tiles.init(32, Config::kTileReaders);
    shared.stages.init(1, Config::kConsumerWarps * p.sharers);
    shared.claims.init(1, 1);
    for (uint64_t& turn : shared.turn) ::cuda::ptx::mbarrier_init(&turn, 1);
    ::cuda::ptx::mbarrier_init(&shared.asked, 1);
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
    Roles::prefetch_maps(p);
  }
  cudaGridDependencySynchronize();
  Roles::prepare(shared, p);
  if (p.sharers > 1)
    ptx_ops::cluster_sync();
  else
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
  if (p.sharers > 1) ptx_ops::cluster_sync();  // a peer may still arrive at this block's barriers
}

/// Clusters of `sharers` blocks, one block an SM.
inline int clusters_of(int device, int sharers) {
  return multiprocessors(device) / sharers;
}

/// Launches on every SM of `device`, early: the kernel itself waits for what comes before it.
template <class Roles>
void launch_gemm(const typename Roles::Parameters& p, int device, cudaStream_t stream) {
  using Config = typename Roles::Config;
  static PerDevice configured;
  configured.once(device, [] {
    check_cuda(cudaFuncSetAttribute(gemm_kernel<Roles>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Config::kSharedBytes),
               "gemm_kernel's shared memory");
  });
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(p.sharers), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = clusters_of(device, p.sharers) * p.sharers;
  config.blockDim = Config::kThreads;
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes, config.numAttrs = p.sharers > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, gemm_kernel<Roles>, p), "gemm_kernel");
}

/// Tells tiles to the other warps. A tile is claimed when the loader asks for it, not sooner: a cluster that
/// held several would keep them from clusters that are free. Rank 0 claims for both blocks.
template <class Config>
struct GemmScheduler {
  using Shared = typename Config::Shared;
  Shared& shared;
  int* const counter;  // of claims beyond the first round: zero before the kernel and after it
  const int sharers;
  RingCursor<Config::kTileSlots> published, claims;
  uint32_t asked_phase = 0;

  __device__ int clusters() const { return static_cast<int>(gridDim.x) / sharers; }
  __device__ int first() const { return static_cast<int>(blockIdx.x) / sharers; }
  /// The cluster's next tile of `items`, once the loader of rank 0 is about to need it: the first round's have the
  /// clusters' own numbers. Not `waits`: at once, since the last one claimed was not published.
  __device__ int claim(int items, bool waits = true) {
    const int claimed = ptx_ops::cluster_rank() == 0 ? claim_and_tell(items, waits) : hear();
    claims.advance();
    return claimed;
  }
  __device__ void hand_on() {
    ptx_ops::arrive(shared.tiles.full[published.slot()]);
    published.advance();
  }

 private:
  __device__ int claim_and_tell(int items, bool waits) {
    if (waits) {
      ptx_ops::wait_parity_relaxed(shared.asked, asked_phase);
      asked_phase ^= 1;
    }
    int claimed = 0;
    if (ptx_ops::lane_index() == 0) {
      const int before = atomicAdd(counter, 1);
      // Every cluster that began claims until it is refused: in all as many times as there are items.
      if (before == items - 1) *counter = 0;
      claimed = clusters() + before;
    }
    if (sharers > 1) {
      claims.wait_empty_relaxed(shared.claims);
      const int slot = claims.slot();
      if (ptx_ops::lane_index() == 0)
        ptx_ops::send(shared.claimed[slot], claimed, shared.claims.full[slot], 1);
    }
    return __shfl_sync(ptx_ops::kWholeWarp, claimed, 0);
  }
  __device__ int hear() {
    claims.wait_full_in_cluster(shared.claims);
    const int slot = claims.slot(), claimed = shared.claimed[slot];
    __syncwarp();
    const uint32_t read = ptx_ops::address_in(ptx_ops::shared_address(&shared.claims.empty[slot]), 0);
    if (ptx_ops::lane_index() == 0) ptx_ops::arrive_at(read);
    return claimed;
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
