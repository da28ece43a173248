// GEMM-Q on the device: what a tile is, and who does what with it. Only features of one head meet tokens of
// that head's active row blocks, any of them: 256 tokens a tile however the pattern lies.
#pragma once

#include <cuda.h>

#include <climits>

#include "flashomni/gemm.h"
#include "src/cuda/sm90/gemm/consumer.cuh"
#include "src/cuda/sm90/gemm/kernel.cuh"

namespace flashomni::cuda::sm90 {

inline constexpr int kNoRow = INT_MIN;
inline constexpr int kMostBlocks = 4;       // row blocks a tile: 2 of 128 tokens, or 4 of 64
inline constexpr int kGroupFeatures = 128;  // of a head, a tile
inline constexpr int kMostSharers = 2;      // blocks of a cluster, whose tiles share the tokens or the weight

/// A cluster's tiles as the plan lists them. Where they share the weight: the same 128 features, each block
/// has row blocks of its own. Where they share the tokens: neighbouring features, and the row blocks of rank
/// 0.
struct QItem {
  // First token of each row block, below 0 where rows lie before the matrix; or kNoRow.
  int row[kMostSharers][kMostBlocks];
  int batch_head, group;  // batch * heads + head; which 128 features, or which pair of them
  int unused[2];
};

/// What the plan leaves for the kernel.
struct QControl {
  int items;
  int next;  // item to claim beyond the first round
};

struct QTile {
  int steps;  // kNoMoreWork ends the loop
  int row[kMostBlocks], blocks;
  int feature, column, head, batch;  // feature: row of the weight; column: of the head
  bool wide;                         // more than 128 tokens
  bool one_panel;                    // 64 features or fewer: the consumers share them, and halve the tokens
  unsigned char bias[kGroupFeatures * 2];
};

struct QParameters {
  CUtensorMap x, weight;
  OutputMatrix out;
  const QItem* items;
  QControl* control;
  const void* bias;  // one a feature, or null
  uint64_t weight_policy;
  int steps, heads, head_features, block_q;
  int sharers;
  bool shares_tokens;  // not the weight; of one block: by itself
  Activation activation;
};

/// Claims tiles ahead of the other warps and tells them.
template <class Config>
struct QScheduler : GemmScheduler<Config> {
  using Element = typename Config::Element;
  const QParameters& p;

  __device__ QScheduler(typename Config::Shared& shared, const QParameters& p)
      : GemmScheduler<Config>{shared, p.sharers}, p(p) {}

  __device__ void run() {
    const int items = p.control->items;
    for (int item = this->first(); item < items; item = this->claim(&p.control->next)) publish(p.items[item]);
    this->published.wait_empty_relaxed(this->shared.tiles);
    this->shared.tile[this->published.slot()].steps = kNoMoreWork;
    this->hand_on();
  }

  __device__ void publish(const QItem& item) {
    const int lane = ptx_ops::lane_index(), rank = ptx_ops::cluster_rank();
    const int* row = item.row[p.shares_tokens ? 0 : rank];
    const int group = p.shares_tokens ? item.group * p.sharers + rank : item.group;
    const int column = group * kGroupFeatures, batch_head = item.batch_head, head = batch_head % p.heads;
    const int feature = head * p.head_features + column, features = p.head_features - column;
    this->published.wait_empty_relaxed(this->shared.tiles);
    QTile& tile = this->shared.tile[this->published.slot()];
    if (lane == 0) {
      int blocks = 0;
#pragma unroll
      for (int i = 0; i < kMostBlocks; ++i) blocks += row[i] != kNoRow, tile.row[i] = row[i];
      tile.steps = p.steps, tile.blocks = blocks;
      tile.feature = feature, tile.column = column, tile.head = head, tile.batch = batch_head / p.heads;
      tile.wide = blocks * p.block_q > 128, tile.one_panel = features <= 64;
    }
    if (p.bias != nullptr)
      for (int i = lane; i < min(features, kGroupFeatures); i += 32)
        reinterpret_cast<Element*>(tile.bias)[i] = static_cast<const Element*>(p.bias)[feature + i];
    this->hand_on();
  }
};

/// Keeps the stages full: 64 columns of the weight's 128 rows and of the tokens of every row block. Of the
/// operand that the cluster shares, rank i loads panel or row block i, i + 2, for both.
template <class Config>
struct QLoader {
  typename Config::Shared& shared;
  const QParameters& p;
  const bool leader = ptx_ops::elect_one();
  const int rank = ptx_ops::cluster_rank();
  RingCursor<Config::kTileSlots> tiles;
  RingCursor<Config::kStages> stages;

  __device__ QLoader(typename Config::Shared& shared, const QParameters& p) : shared(shared), p(p) {}

  __device__ void run() {
    for (;; tiles.advance()) {
      tiles.wait_full(shared.tiles);
      const QTile& tile = shared.tile[tiles.slot()];
      const int steps = tile.steps;
      if (steps == kNoMoreWork) return;
      for (int k = 0; k < steps; ++k, stages.advance()) {
        if (leader && k == max(steps - Config::kStepsAhead, 0)) ptx_ops::arrive(shared.asked);
        stages.wait_empty(shared.stages);
        if (leader) copy(tile, k * Config::kStepK);
      }
      ptx_ops::arrive(shared.tiles.empty[tiles.slot()]);
    }
  }

  __device__ void copy(const QTile& tile, int column) {
    uint64_t& full = shared.stages.full[stages.slot()];
    const uint32_t weight = ptx_ops::shared_address(shared.stage[stages.slot()]);
    const uint32_t tokens = weight + Config::kNarrowBytes;
    const int panels = tile.one_panel ? 1 : 2;
    ptx_ops::arrive_expect_bytes(full, (panels * 64 + tile.blocks * p.block_q) * Config::kRowBytes);
    for (int i = 0; i < panels; ++i)
      load(!p.shares_tokens, i, weight + i * 64 * Config::kRowBytes, p.weight, full,
           {column, tile.feature + 64 * i, 0, 0}, p.weight_policy);
    for (int i = 0; i < tile.blocks; ++i)
      load(p.shares_tokens, i, tokens + i * p.block_q * Config::kRowBytes, p.x, full,
           {column, tile.row[i], 0, tile.batch}, ptx_ops::kEvictNormal);
  }
  __device__ void load(bool shared_by_all, int i, uint32_t to, const CUtensorMap& map, uint64_t& full,
                       ptx_ops::BoxStart start, uint64_t l2_policy) {
    if (!shared_by_all || p.sharers == 1)
      ptx_ops::tma_load(to, &map, full, start, l2_policy);
    else if (i % kMostSharers == rank)
      ptx_ops::tma_load_to(0b11, to, &map, full, start, l2_policy);
  }
};

template <class Config>
struct QStorer : GemmStorer<Config> {
  const QParameters& p;

  __device__ QStorer(typename Config::Shared& shared, const QParameters& p)
      : GemmStorer<Config>{shared}, p(p) {}

  __device__ void run() {
    for (;;) {
      this->tiles.wait_full(this->shared.tiles);
      const QTile& tile = this->shared.tile[this->tiles.slot()];
      if (tile.steps == kNoMoreWork) break;
      this->store_both([&](int consumer) { copy(tile, consumer); });
      this->release_tile();
    }
    this->finish();
  }

  /// [tokens][64 features] is what a consumer staged: of all row blocks, or of half of them.
  __device__ void copy(const QTile& tile, int consumer) {
    const int skipped = tile.one_panel ? consumer * (128 / p.block_q) : 0;
    const int end = tile.one_panel ? min(tile.blocks, skipped + 128 / p.block_q) : tile.blocks;
    const int column = tile.column + (tile.one_panel ? 0 : 64 * consumer);
    for (int i = skipped; i < end; ++i)
      p.out.store(this->shared.staging + (i - skipped) * p.block_q * Config::kRowBytes, p.block_q,
                  {column, tile.row[i], tile.head, tile.batch}, this->leader);
  }
};

}  // namespace flashomni::cuda::sm90
