// Clusters of thread blocks: ranks, barriers of a peer, values handed to it, copies that both receive.
#pragma once

#include "src/cuda/ptx/tma.cuh"

namespace flashomni::cuda::ptx_ops {

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// All threads of all blocks of the cluster: what each did before is seen by all after.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/// Where block `rank` of the cluster has what lies at `address` here.
__device__ inline uint32_t address_in(uint32_t address, int rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

/// At a barrier of any block, by its address in the cluster. It says that slots have been read: a release to
/// the whole cluster would be a fence of all memory (MEMBAR.ALL.GPU) at every step.
__device__ inline void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Writes `value` over `to` in block `rank`, and arrives at `barrier` there.
__device__ inline void send(int& to, int value, uint64_t& barrier, int rank) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in(shared_address(&to), rank)), "r"(value)
               : "memory");
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   address_in(shared_address(&barrier), rank))
               : "memory");
}

/// A wait for what a peer sent.
__device__ inline void wait_parity_in_cluster(uint64_t& barrier, uint32_t parity) {
  constexpr uint32_t suspend_ns = 1'000'000;
  while (!::cuda::ptx::mbarrier_try_wait_parity(::cuda::ptx::sem_acquire, ::cuda::ptx::scope_cluster,
                                                &barrier, parity, suspend_ns))
    __nanosleep(500);
}

/// tma_load into the same place of every block of `blocks` (a bit a rank); the bytes count at each one's
/// barrier.
__device__ inline void tma_load_to(uint16_t blocks, uint32_t destination, const void* map, uint64_t& barrier,
                                   BoxStart start, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::"
      "cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(destination),
      "l"(map), "r"(shared_address(&barrier)), "r"(start.column), "r"(start.row), "r"(start.head),
      "r"(start.batch), "h"(blocks), "l"(l2_policy)
      : "memory");
}

}  // namespace flashomni::cuda::ptx_ops
