// Every size of the block-sparse attention kernel: tile, threads, registers, shared memory, barriers.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "src/cuda/sm90/attention/problem.cuh"
#include "src/cuda/sm90/ring.cuh"

namespace flashomni::cuda::sm90 {

struct AttentionParameters {
  CUtensorMap q, k, v, out;
  CUtensorMap k_mean, v_mean;  // of the summaries
  Problem problem;
  Grouping grouping;
  const Item* items;
  Control* control;
  float4* parts;  // what the parts of split tiles leave: see split.cuh
  int* arrivals;  // of these parts, a count a tile and consumer warp
  unsigned char* out_data;  // for rows that no tensor map writes: a ragged sequence's tail, split tiles
  float* lse;      // base 2; may be null
  int64_t out_batch_stride, out_token_stride, out_head_stride;  // elements
  int64_t lse_batch_stride, lse_token_stride, lse_head_stride;  // elements
  int head_dim;    // as stored; the kernel's own is padded
  int kv_group;    // query heads a key/value head
  float scale_log2, inverse_scale_log2;
};

inline constexpr int kNoMoreTiles = -1;
inline constexpr int kEverythingSeen = 1 << 30;

/// Keys a step: 64 where the accumulators or the shared memory leave no room for 128. A box of K or V has as
/// many rows, or block_kv if that is less.
constexpr int step_keys(int head_dim, int block_q) {
  return head_dim == 256 || block_q == 64 ? 64 : 128;
}

/// Whether K and V are read by maps of panels, a block by one copy where it is a step's.
constexpr bool reads_panels(int head_dim) { return head_dim == 128 || head_dim == 256; }

/// CTAs an SM. Tiles of 64 rows have one consumer; a second CTA takes the place of the other where it fits.
constexpr int ctas_an_sm(int head_dim, int block_q) {
  return block_q == 64 && head_dim <= 128 ? 2 : 1;
}

/// What the manager tells the other warps of a tile.
struct Tile {
  int steps;      // kNoMoreTiles ends the loop
  int masked;     // of them, the last ones: those that come with a mask
  int summaries;  // of these, the last ones: those that walk block means
  int first;      // the step of the tile with which a part begins, else 0
  int summaries_before;  // summary steps of earlier parts
  int pieces;     // that the steps other than summaries read, one or two a step, those before `first` included
  int part, parts, split;  // this part of how many (1: a whole tile), and the tile's number among the split
  int q_block, head, kv_head, batch;
  int q_row, rows;  // first row in the tensors, valid rows: 0 of a tile of nothing
  int kv_row;       // of the sequence's first key
  int q_tokens, kv_tokens;  // of the sequence
};

/// Added to the scores of a step, in units of log2: 0, -inf where there is no key (its score is finite: what is
/// not ours is zeroed), a summary's weight. And the causal limit.
template <int kColumns>
struct ColumnMask {
  alignas(8) float term[kColumns];
  int limit[2];  // of each 64-column half: row r of the tile sees its columns <= r + limit
};

template <class Element_, int kHeadDim_, int kConsumers_>
struct AttentionConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kPanels = (kHeadDim + 63) / 64;
  static constexpr int kConsumers = kConsumers_, kConsumerRows = 64, kConsumerWarps = 4 * kConsumers;
  static constexpr int kBlockQ = kConsumerRows * kConsumers;
  static constexpr int kCtas = ctas_an_sm(kHeadDim, kBlockQ);
  static constexpr int kStep = step_keys(kHeadDim, kBlockQ);
  static constexpr bool kReadsPanels = reads_panels(kHeadDim);
  static constexpr int kRingSlots = 5;
  static constexpr int kQuerySlots = kHeadDim == 256 && kConsumers == 2 ? 1 : 2;
  static constexpr bool kOverlapsTiles = kQuerySlots == 2;  // the next tile's query waits beside this one's
  // A CTA begins with a tile of nothing, so that its first tile runs through the code between two tiles, which all
  // others run through, and no code is fetched for it alone.
  static constexpr bool kBeginsBetween = kOverlapsTiles && kConsumers == 2;
  static constexpr int kMaskSlots = kCtas == 2 ? 2 : 3;
  static constexpr int kTileSlots = 4, kTilesAhead = 3;  // claimed before they are stored
  static constexpr int kStepsAhead = 6;  // of a tile left to load when a patient manager claims the next one
  // Two producer warps: the manager (schedules and stores) and the loader. Beside two consumers they give
  // registers away, which takes a whole warpgroup: two more warps, which leave at once.
  static constexpr bool kMovesRegisters = kConsumers == 2;
  static constexpr int kThreads = 128 * kConsumers + (kMovesRegisters ? 128 : 64);
  static constexpr int kStoreThreads = 128 * kConsumers + 32;
  static constexpr int kProducerRegisters = kHeadDim == 64 ? 72 : kHeadDim == 96 ? 56 : 40;
  static constexpr int kConsumerRegisters = kHeadDim == 64 ? 216 : kHeadDim == 96 ? 224 : 232;

  // Shared-memory plan.
  struct alignas(1024) Shared {
    Element query[kQuerySlots][kConsumers][kConsumerRows * kPanels * 64];  // the output is staged in it, too
    Element ring[kRingSlots][kStep * kPanels * 64];                        // K0 K1 V0 K2 V1 ...
    ColumnMask<kStep> mask[kMaskSlots];
    Tile tile[kTileSlots];
    // barrier | full: arrivals, by  | empty: arrivals, by                       | guards
    // tiles   | 32, manager lanes   | 1 + consumer warps: loader, the epilogues | tile
    // queries | 1 + bytes, manager  | -: the manager itself stores the output   | query
    // blocks  | 1 + bytes, loader   | consumer warps                            | ring
    // masks   | 32, loader lanes    | consumer threads                          | mask
    // landing | 1 + bytes, loader   | -: only the loader waits                  | a block to be cleaned
    RingBarriers<kTileSlots> tiles;
    uint64_t queries[kQuerySlots];
    RingBarriers<kRingSlots> blocks;
    RingBarriers<kMaskSlots> masks;
    uint64_t landing;
    int near_end;  // tiles of which the loader has few steps left or none; by atomics: it writes, the manager reads
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static constexpr uint32_t kQueryBytes = kBlockQ * kPanels * 128, kStepBytes = kStep * kPanels * 128;
  static_assert(kSharedBytes <= (kCtas == 2 ? 113 : 227) * 1024);
};

// Named barriers (0 is __syncthreads). A warp that waits at one is not polling, unlike at an mbarrier.
enum NamedBarrier : int {
  kTurnOfConsumer0 = 1,  // the other consumer's 128 threads arrive, consumer 0's wait: its turn
  kTurnOfConsumer1 = 2,
  kOutputStaged0 = 3,  // the consumers arrive, the manager waits: the output lies in query slot 0
  kOutputStaged1 = 4,
};

}  // namespace flashomni::cuda::sm90
