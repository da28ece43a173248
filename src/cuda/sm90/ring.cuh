// A ring of shared-memory slots guarded by a full and an empty mbarrier each.
#pragma once

#include <cstdint>

#include "src/cuda/ptx/cluster.cuh"
#include "src/cuda/ptx/mbarrier.cuh"

namespace flashomni::cuda::sm90 {

template <int kSlots>
struct RingBarriers {
  uint64_t full[kSlots], empty[kSlots];
  __device__ void init(int full_arrivals, int empty_arrivals) {
    for (int i = 0; i < kSlots; ++i) {
      ::cuda::ptx::mbarrier_init(&full[i], full_arrivals);
      ::cuda::ptx::mbarrier_init(&empty[i], empty_arrivals);
    }
  }
};

/// One warp's place in a ring. Every warp that uses a ring visits every slot in order.
template <int kSlots>
class RingCursor {
 public:
  RingCursor() = default;
  /// After `visited` slots, where that number alone tells slot and phase for good.
  __device__ explicit RingCursor(int visited) : at_(visited & (2 * kSlots - 1)) {
    static_assert((kSlots & (kSlots - 1)) == 0);
  }
  __device__ int slot() const { return at_ >= kSlots ? at_ - kSlots : at_; }
  __device__ void advance() { at_ = at_ == 2 * kSlots - 1 ? 0 : at_ + 1; }
  __device__ void wait_full(RingBarriers<kSlots>& ring) const {
    ptx_ops::wait_parity(ring.full[slot()], phase());
  }
  __device__ void wait_full_in_cluster(RingBarriers<kSlots>& ring) const {
    ptx_ops::wait_parity_in_cluster(ring.full[slot()], phase());
  }
  /// Of a ring whose slots are filled by the one who empties them: it has no barriers for that.
  __device__ void wait(uint64_t (&full)[kSlots]) const { ptx_ops::wait_parity(full[slot()], phase()); }
  __device__ void wait_empty(RingBarriers<kSlots>& ring) const {
    ptx_ops::wait_parity(ring.empty[slot()], phase() ^ 1);
  }
  __device__ void wait_empty_relaxed(RingBarriers<kSlots>& ring) const {
    ptx_ops::wait_parity_relaxed(ring.empty[slot()], phase() ^ 1);
  }

 private:
  __device__ uint32_t phase() const { return at_ >= kSlots; }
  int at_ = 0;  // of two turns round the ring: one register holds slot and phase
};

}  // namespace flashomni::cuda::sm90
