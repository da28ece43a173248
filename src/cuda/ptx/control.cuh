// Control of warps and warpgroups on Hopper: election, register budgets, named barriers.
#pragma once

#include <cstdint>

namespace flashomni::cuda::ptx_ops {

inline constexpr uint32_t kWholeWarp = 0xffffffff;

/// threadIdx.x, read anew at every call: what is computed from it is not kept in registers in between.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
__device__ inline int lane_index() {
  return thread_index() % 32;
}
/// `value`, of which the compiler knows nothing: what is computed from it is not kept in registers either.
__device__ inline int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// True in exactly one lane of a converged warp.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}

template <int kRegisters>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Arrives at a named barrier (0 is __syncthreads) of `threads` threads and waits there.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Arrives without waiting.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flashomni::cuda::ptx_ops
