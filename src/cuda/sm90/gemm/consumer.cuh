// What the consumers of both GEMMs share: the main loop, and taking turns at the staging buffer.
#pragma once

#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/matrix.cuh"
#include "src/cuda/ptx/wgmma.cuh"
#include "src/cuda/sm90/gemm/config.cuh"

namespace flashomni::cuda::sm90 {

/// One step of GEMM-O, as the loader writes it: bit i, consumer i multiplies; from bit 4 on, how many of the
/// four 16-column slices hold columns.
struct Step {
  static constexpr uint32_t kWholeDepth = GemmSizes::kStepK / 16;
  __device__ static uint32_t make(uint32_t consumers, uint32_t depth) { return consumers | depth << 4; }
  __device__ static bool takes(uint32_t step, int consumer) { return step >> consumer & 1; }
  __device__ static uint32_t depth(uint32_t step) { return step >> 4; }
};

template <class Config>
struct GemmConsumer {
  using Element = typename Config::Element;
  using Shared = typename Config::Shared;
  using Tile = typename Config::Tile;

  Shared& shared;
  const int id;
  const bool leader = ptx_ops::lane_index() == 0;
  RingCursor<Config::kTileSlots> tiles;
  RingCursor<Config::kStages> stages;
  uint32_t turn_phase;

  // Consumer 0 begins; the first turn of consumer 1 comes with consumer 0's first output.
  __device__ GemmConsumer(Shared& shared, int id) : shared(shared), id(id), turn_phase(id == 0) {}

  __device__ const Tile& take_tile() {
    tiles.wait_full(shared.tiles);
    return shared.tile[tiles.slot()];
  }
  __device__ void release_tile() {
    __syncwarp();
    if (leader) ptx_ops::arrive(shared.tiles.empty[tiles.slot()]);
    tiles.advance();
  }
  __device__ void release(int slot) {
    if (leader) ptx_ops::arrive(shared.stages.empty[slot]);
  }

  /// Adds `steps` products of 64 rows at `a` and kN rows at `b` (bytes into the stage) to d; without
  /// kAccumulates, the first one sets it. kPicks: the loader says which steps are this consumer's.
  template <int kN, bool kAccumulates, bool kPicks>
  __device__ void multiply(float (&d)[kN / 2], int steps, uint32_t a, uint32_t b) {
    using Product = ptx_ops::Wgmma<Element, kN, ptx_ops::Major::kReduction>;
    const uint32_t base = ptx_ops::shared_address(shared.stage[0]);
    int last = -1;  // the stage that products in flight may read
    for (int k = 0; k < steps; ++k) {
      stages.wait_full(shared.stages);
      const int slot = stages.slot();
      uint32_t depth = Step::kWholeDepth;
      if constexpr (kPicks) {
        const uint32_t step = shared.step[slot];
        depth = Step::depth(step);
        if (!Step::takes(step, id)) {
          finish(d, last);
          last = -1;
          __syncwarp();
          release(slot);
          stages.advance();
          continue;
        }
      }
      const uint32_t at = base + slot * Config::kStageBytes;
      const uint32_t a_low = ptx_ops::descriptor_reduction_major(at + a);
      const uint32_t b_low = ptx_ops::descriptor_reduction_major(at + b);
      constexpr uint32_t slice = 32 >> 4;  // of 16 columns, in the descriptor's units
      ptx_ops::wgmma_fence();
      if (!kPicks || depth == Step::kWholeDepth) {
#pragma unroll
        for (uint32_t i = 0; i < Step::kWholeDepth; ++i)
          Product::ss(d, ptx_ops::descriptor(a_low + slice * i), ptx_ops::descriptor(b_low + slice * i),
                      kAccumulates || k > 0 || i > 0);
      } else {
#pragma unroll 1
        for (uint32_t i = 0; i < depth; ++i)
          Product::ss(d, ptx_ops::descriptor(a_low + slice * i), ptx_ops::descriptor(b_low + slice * i), true);
      }
      ptx_ops::wgmma_commit();
      ptx_ops::wgmma_wait<1>();
      if (last >= 0) release(last);
      last = slot;
      stages.advance();
    }
    finish(d, last);
  }
  template <int kCount>
  __device__ void finish(float (&d)[kCount], int last) {
    ptx_ops::wgmma_wait<0>();
    ptx_ops::pin(d);
    if (last >= 0) release(last);
  }

  /// Until the other consumer's output has left the staging buffer.
  __device__ void wait_turn() {
    ptx_ops::wait_parity(shared.turn[id], turn_phase);
    turn_phase ^= 1;
  }
  /// Hands the turn on with what is staged, if `stores`, else with nothing.
  __device__ void end_turn(bool stores) {
    if (ptx_ops::thread_index() % 128 == 0) shared.stores[id] = stores;
    if (stores) ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx_ops::named_barrier_arrive(kOutputStaged0 + id, Config::kStoreThreads);
  }
};

}  // namespace flashomni::cuda::sm90
