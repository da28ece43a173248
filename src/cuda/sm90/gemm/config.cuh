// Every size of the sparse GEMM kernels: tile, threads, registers, shared memory, barriers.
#pragma once

#include <cstdint>

#include "src/cuda/sm90/ring.cuh"

namespace flashomni::cuda::sm90 {

inline constexpr int kNoMoreWork = -1;

/// A stage holds 128 rows of one operand and 256 of the other, 64 columns of the reduction: GEMM-Q's tile is
/// 128 features by 256 tokens, GEMM-O's 128 tokens by 256 features. Two blocks of a cluster, where there are
/// two, take tiles that share an operand: each loads half of it, for both.
struct GemmSizes {
  static constexpr int kNarrow = 128, kWide = 256, kStepK = 64, kStages = 4, kTileSlots = 4;
  static constexpr int kConsumers = 2, kConsumerWarps = 4 * kConsumers, kThreads = 128 * (1 + kConsumers);
  static constexpr int kStoreThreads = 128 + 32;
  static constexpr int kTileReaders = 32 * (2 + kConsumerWarps);
  static constexpr int kStepsAhead = 6;  // of a tile left to load when the next one is claimed
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  static constexpr uint32_t kRowBytes = kStepK * 2;
  static constexpr uint32_t kNarrowBytes = kNarrow * kRowBytes, kWideBytes = kWide * kRowBytes;
  static constexpr uint32_t kStageBytes = kNarrowBytes + kWideBytes;
  static constexpr uint32_t kStagingBytes = 64 * kWide * 2;  // the output of one consumer
};

/// GEMM-O's: its scheduler reads the bits themselves.
struct NoPlan {};

template <class Element_, class Tile_, class Plan = NoPlan>
struct GemmConfig : GemmSizes {
  using Element = Element_;
  using Tile = Tile_;

  // Shared-memory plan: 4 stages of 48 KB; 32 KB of staging, which the consumers fill in turns. So one
  // consumer's epilogue runs while the other multiplies.
  struct alignas(1024) Shared {
    unsigned char stage[kStages][kStageBytes];
    unsigned char staging[kStagingBytes];
    Tile tile[kTileSlots];
    uint32_t step[kStages];  // GEMM-O: bit i, consumer i takes the stage
    float coefficient[4];    // GEMM-O
    int claimed[kTileSlots];
    Plan plan;  // GEMM-Q
    // barrier | full: arrivals, by     | empty: arrivals, by                   | guards
    // tiles   | 32, scheduler lanes    | every lane: loader, storer, consumers | tile
    // stages  | 1 + bytes, loaders     | consumer warps of the cluster         | stage; of this block: step
    // claims  | 1, rank 0's scheduler, | 1, rank 1's scheduler, at rank 0's    | claimed, of rank 1
    //         |    at rank 1's         |                                       |
    // turn[i] | 1, storer: the other consumer's output has left; consumer i waits to fill staging
    // asked   | 1, loader: few steps of its last tile are left; the scheduler waits to claim the next one
    RingBarriers<kTileSlots> tiles;
    RingBarriers<kStages> stages;
    RingBarriers<kTileSlots> claims;
    uint64_t turn[kConsumers];
    uint64_t asked;
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);
};

// Named barriers (0 is __syncthreads). A warp that waits at one is not polling, unlike at an mbarrier.
enum GemmBarrier : int {
  kOutputStaged0 = 1,  // consumer 0's 128 threads arrive, the storer waits: its output lies in staging
  kOutputStaged1 = 2,
};

}  // namespace flashomni::cuda::sm90
