// Bulk tensor copies (TMA) through the maps of sm90/tensor_map.h.
#pragma once

#include "src/cuda/ptx/mbarrier.cuh"

namespace flashomni::cuda::ptx_ops {

// What createpolicy.fractional.L2 gives for a fraction of 1.0: constants, which cost no registers.
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000,
                          kEvictNormal = 0x1000000000000000;

/// Where a box starts, in elements.
struct BoxStart {
  int column, row, head, batch;
};

__device__ inline void tma_load(uint32_t destination, const void* map, uint64_t& barrier, BoxStart start,
                                uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(map), "r"(shared_address(&barrier)), "r"(start.column), "r"(start.row), "r"(start.head),
      "r"(start.batch), "l"(l2_policy)
      : "memory");
}

/// By a map of panels.
struct PanelBoxStart {
  int row, panel, head, batch;
};

__device__ inline void tma_load_panels(uint32_t destination, const void* map, uint64_t& barrier, PanelBoxStart start,
                                       uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(destination),
      "l"(map), "r"(shared_address(&barrier)), "r"(0), "r"(start.row), "r"(start.panel), "r"(start.head),
      "r"(start.batch), "l"(l2_policy)
      : "memory");
}

__device__ inline void tma_store(const void* map, uint32_t source, BoxStart start) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(source), "r"(start.column), "r"(start.row), "r"(start.head), "r"(start.batch)
      : "memory");
}

__device__ inline void tma_store(const void* map, uint32_t source, BoxStart start, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], "
      "%6;" ::"l"(map),
      "r"(source), "r"(start.column), "r"(start.row), "r"(start.head), "r"(start.batch), "l"(l2_policy)
      : "memory");
}

/// The first copy by a map waits for it otherwise.
__device__ inline void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace flashomni::cuda::ptx_ops
