// Shared-memory barriers that count arrivals and bytes (mbarrier).
#pragma once

#include <cstdint>
#include <cuda/ptx>

namespace flashomni::cuda::ptx_ops {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void wait_parity(uint64_t& barrier, uint32_t parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(&barrier, parity)) {
  }
}

/// For warps that have time: a spinning warp takes issue slots and power from the others.
__device__ inline void wait_parity_relaxed(uint64_t& barrier, uint32_t parity) {
  constexpr uint32_t suspend_ns = 1'000'000;
  while (!::cuda::ptx::mbarrier_try_wait_parity(&barrier, parity, suspend_ns)) __nanosleep(500);
}

__device__ inline void arrive(uint64_t& barrier) {
  ::cuda::ptx::mbarrier_arrive(&barrier);
}

/// Arrives, and makes the phase wait for `bytes` of bulk copies too.
__device__ inline void arrive_expect_bytes(uint64_t& barrier, uint32_t bytes) {
  ::cuda::ptx::mbarrier_arrive_expect_tx(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta,
                                         ::cuda::ptx::space_shared, &barrier, bytes);
}

}  // namespace flashomni::cuda::ptx_ops
