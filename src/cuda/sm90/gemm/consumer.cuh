// What the consumers of both GEMMs share: the main loop, and taking turns at the staging buffer.
#pragma once

#include "src/cuda/ptx/cluster.cuh"
#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/matrix.cuh"
#include "src/cuda/ptx/wgmma.cuh"
#include "src/cuda/sm90/gemm/config.cuh"

namespace flashomni::cuda::sm90 {

template <class Config>
struct GemmConsumer {
  using Element = typename Config::Element;
  using Shared = typename Config::Shared;
  using Tile = typename Config::Tile;

  Shared& shared;
  const int id;
  const int rank = ptx_ops::cluster_rank(), lane = ptx_ops::lane_index();
  const bool releases;   // a lane for every loader of the cluster, as each of them fills this block's stages
  const uint32_t empty;  // stages.empty of that loader's block
  RingCursor<Config::kTileSlots> tiles;
  RingCursor<Config::kStages> stages;
  uint32_t turn_phase;

  // Consumer 0 begins; the first turn of consumer 1 comes with consumer 0's first output.
  __device__ GemmConsumer(Shared& shared, int id, int sharers)
      : shared(shared),
        id(id),
        releases(lane < sharers),
        empty(ptx_ops::address_in(ptx_ops::shared_address(shared.stages.empty), releases ? lane : 0)),
        turn_phase(id == 0) {}

  __device__ const Tile& take_tile() {
    tiles.wait_full(shared.tiles);
    return shared.tile[tiles.slot()];
  }
  __device__ void release_tile() {
    ptx_ops::arrive(shared.tiles.empty[tiles.slot()]);
    tiles.advance();
  }
  __device__ void release(int slot) {
    if (releases) ptx_ops::arrive_at(empty + slot * sizeof(uint64_t));
  }

  /// Adds `steps` products of 64 rows at `a` and kN rows at `b` (bytes into the stage) to d. kPicks: the
  /// loader says which steps are this consumer's.
  template <int kN, bool kPicks>
  __device__ void multiply(float (&d)[kN / 2], int steps, uint32_t a, uint32_t b) {
    for (int k = 0; k < steps;) {
      int last = take_stage();
      if (kPicks && !is_mine(last)) {
        skip(last), ++k;
        continue;
      }
      // The first product stands before the loop: in the loop only products may write d, or ptxas serialises
      // them (C7515).
      issue<kN>(d, last, a, b);
      for (++k; k < steps; ++k) {
        const int slot = take_stage();
        if (kPicks && !is_mine(slot)) break;  // and is met again above, when this consumer holds no stage
        issue<kN>(d, slot, a, b);
        ptx_ops::wgmma_wait<1>();
        release(last);
        last = slot;
      }
      ptx_ops::wgmma_wait<0>();
      ptx_ops::pin(d);
      release(last);
    }
  }
  /// Waits for the next stage, which stays the next until it is issued or skipped.
  __device__ int take_stage() {
    stages.wait_full(shared.stages);
    return stages.slot();
  }
  // Read by the lane that frees the stage for this block's loader.
  __device__ bool is_mine(int slot) const {
    const uint32_t consumers = lane == rank ? shared.step[slot] : 0;
    return __shfl_sync(ptx_ops::kWholeWarp, consumers, rank) >> id & 1;
  }
  __device__ void skip(int slot) {
    __syncwarp();
    release(slot);
    stages.advance();
  }
  template <int kN>
  __device__ void issue(float (&d)[kN / 2], int slot, uint32_t a, uint32_t b) {
    using Product = ptx_ops::Wgmma<Element, kN, ptx_ops::Major::kReduction>;
    constexpr uint32_t slice = 32 >> 4;  // of 16 columns, in the descriptor's units
    const uint32_t at = ptx_ops::shared_address(shared.stage[0]) + slot * Config::kStageBytes;
    const uint32_t a_low = ptx_ops::descriptor_reduction_major(at + a);
    const uint32_t b_low = ptx_ops::descriptor_reduction_major(at + b);
    ptx_ops::wgmma_fence();
#pragma unroll
    for (uint32_t i = 0; i < Config::kStepK / 16; ++i)
      Product::ss(d, ptx_ops::descriptor(a_low + slice * i), ptx_ops::descriptor(b_low + slice * i), true);
    ptx_ops::wgmma_commit();
    stages.advance();
  }

  /// Until the other consumer's output has left the staging buffer.
  __device__ void wait_turn() {
    ptx_ops::wait_parity(shared.turn[id], turn_phase);
    turn_phase ^= 1;
  }
  /// Hands the turn on with what is staged.
  __device__ void end_turn() {
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx_ops::named_barrier_arrive(kOutputStaged0 + id, Config::kStoreThreads);
  }
};

}  // namespace flashomni::cuda::sm90
