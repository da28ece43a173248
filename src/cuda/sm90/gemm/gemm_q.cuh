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
inline constexpr int kMostBlocks = 4;      // row blocks a tile: 2 of 128 tokens, or 4 of 64
inline constexpr int kGroupFeatures = 128;  // of a head, a tile

/// A tile as the plan lists it: 128 features of a head and the active row blocks that it takes.
struct QItem {
  int row[kMostBlocks];  // first token of each row block, below 0 where rows lie before the matrix; or kNoRow
  int batch_head, group;  // batch * heads + head; which 128 features
  int unused[2];
};

/// What the plan leaves for the kernel.
struct QControl {
  int tiles;
  int next;  // tile to claim beyond the first round
};

struct QTile {
  int steps;  // kNoMoreWork ends the loop
  int row[kMostBlocks], blocks;
  int feature, column, head, batch;  // feature: row of the weight; column: of the head
  bool wide;    // more than 128 tokens
  bool one_panel;  // 64 features or fewer: the consumers share them, and halve the tokens
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
  Activation activation;
};

/// Claims tiles ahead of the other warps and tells them.
template <class Config>
struct QScheduler : GemmScheduler<Config> {
  using Element = typename Config::Element;
  const QParameters& p;

  __device__ QScheduler(typename Config::Shared& shared, const QParameters& p)
      : GemmScheduler<Config>{shared}, p(p) {}

  __device__ void run() {
    const int tiles = p.control->tiles;
    for (int tile = blockIdx.x; tile < tiles; tile = this->claim(&p.control->next)) publish(tile);
    this->published.wait_empty_relaxed(this->shared.tiles);
    this->shared.tile[this->published.slot()].steps = kNoMoreWork;
    this->hand_on();
  }

  __device__ void publish(int index) {
    const int lane = ptx_ops::lane_index();
    const QItem item = p.items[index];
    const int column = item.group * kGroupFeatures, head = item.batch_head % p.heads;
    const int feature = head * p.head_features + column, features = p.head_features - column;
    this->published.wait_empty_relaxed(this->shared.tiles);
    QTile& tile = this->shared.tile[this->published.slot()];
    if (lane == 0) {
      int blocks = 0;
#pragma unroll
      for (int i = 0; i < kMostBlocks; ++i) blocks += item.row[i] != kNoRow, tile.row[i] = item.row[i];
      tile.steps = p.steps, tile.blocks = blocks;
      tile.feature = feature, tile.column = column, tile.head = head, tile.batch = item.batch_head / p.heads;
      tile.wide = blocks * p.block_q > 128, tile.one_panel = features <= 64;
    }
    if (p.bias != nullptr)
      for (int i = lane; i < min(features, kGroupFeatures); i += 32)
        reinterpret_cast<Element*>(tile.bias)[i] = static_cast<const Element*>(p.bias)[feature + i];
    this->hand_on();
  }
};

/// Keeps the stages full: 64 columns of the weight's 128 rows and of the tokens of every row block.
template <class Config>
struct QLoader {
  typename Config::Shared& shared;
  const QParameters& p;
  const bool leader = ptx_ops::elect_one();
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
      ptx_ops::tma_load(weight + i * 64 * Config::kRowBytes, &p.weight, full, {column, tile.feature + 64 * i, 0, 0},
                        p.weight_policy);
    for (int i = 0; i < tile.blocks; ++i)
      ptx_ops::tma_load(tokens + i * p.block_q * Config::kRowBytes, &p.x, full,
                        {column, tile.row[i], 0, tile.batch}, ptx_ops::kEvictNormal);
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
