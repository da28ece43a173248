// GEMM-Q on the device: what a tile is, and who does what with it. Only features of one head meet tokens of
// that head's active row blocks, any of them: 256 tokens a tile however the pattern lies.
#pragma once

#include <cuda.h>

#include <climits>

#include "flashomni/gemm.h"
#include "src/cuda/sm90/gemm/consumer.cuh"
#include "src/cuda/sm90/gemm/kernel.cuh"
#include "src/cuda/sm90/gemm/split.cuh"

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
  int wide, narrow;       // tiles of more than 128 tokens, then those of fewer
  int split, split_ctas;  // how many come first, and over how many CTAs they are split
  int next;               // tile to claim beyond the first round
};

struct QTile {
  int steps;       // kNoMoreWork ends the loop
  int first_step;  // of the reduction, where a part begins
  int row[kMostBlocks], blocks;
  int feature, column, head, batch;  // feature: row of the weight; column: of the head
  bool wide;    // more than 128 tokens
  bool one_panel;  // 64 features or fewer: the consumers share them, and halve the tokens
  int parts, split, first_cta;  // of a split tile, else parts = 1
  unsigned char bias[kGroupFeatures * 2];
};

struct QParameters {
  CUtensorMap x, weight, out;  // out: by heads, so that a tile's copies end with its head
  const QItem* items;
  QControl* control;
  float4* parts;
  int* arrivals;
  const void* bias;  // one a feature, or null
  uint64_t weight_policy;
  int steps, heads, head_features, block_q;
  Activation activation;
};

/// Claims tiles ahead of the other warps and tells them.
template <class Config>
struct QScheduler {
  using Element = typename Config::Element;
  typename Config::Shared& shared;
  const QParameters& p;
  RingCursor<Config::kTileSlots> published;

  __device__ QScheduler(typename Config::Shared& shared, const QParameters& p) : shared(shared), p(p) {}

  __device__ void run() {
    const int split = p.control->split, tiles = p.control->wide + p.control->narrow;
    publish_parts({split, p.steps, p.control->split_ctas});
    for (int tile = split + blockIdx.x; tile < tiles;) {
      publish(tile, 0, p.steps, 1, 0);
      int claimed = 0;
      if (ptx_ops::lane_index() == 0) claimed = atomicAdd(&p.control->next, 1);
      tile = split + gridDim.x + __shfl_sync(ptx_ops::kWholeWarp, claimed, 0);
    }
    published.wait_empty_relaxed(shared.tiles);
    shared.tile[published.slot()].steps = kNoMoreWork;
    ptx_ops::arrive(shared.tiles.full[published.slot()]);
  }

  /// This CTA's stretch of the split tiles.
  __device__ void publish_parts(const QSplit& split) {
    if (static_cast<int>(blockIdx.x) >= split.ctas) return;
    const int end = split.begin(blockIdx.x + 1);
    for (int at = split.begin(blockIdx.x); at < end;) {
      const int tile = at / split.steps, first = tile * split.steps, last = min(end, first + split.steps);
      const int first_cta = split.owner(first), last_cta = split.owner(first + split.steps - 1);
      publish(tile, at - first, last - at, last_cta - first_cta + 1, first_cta);
      at = last;
    }
  }

  __device__ void publish(int index, int first_step, int steps, int parts, int first_cta) {
    const int lane = ptx_ops::lane_index();
    const QItem item = p.items[index];
    const int column = item.group * kGroupFeatures, head = item.batch_head % p.heads;
    const int feature = head * p.head_features + column, features = p.head_features - column;
    published.wait_empty_relaxed(shared.tiles);
    QTile& tile = shared.tile[published.slot()];
    if (lane == 0) {
      int blocks = 0;
#pragma unroll
      for (int i = 0; i < kMostBlocks; ++i) blocks += item.row[i] != kNoRow, tile.row[i] = item.row[i];
      tile.steps = steps, tile.first_step = first_step, tile.blocks = blocks;
      tile.feature = feature, tile.column = column, tile.head = head, tile.batch = item.batch_head / p.heads;
      tile.wide = blocks * p.block_q > 128, tile.one_panel = features <= 64;
      tile.parts = parts, tile.split = index, tile.first_cta = first_cta;
    }
    if (p.bias != nullptr)
      for (int i = lane; i < min(features, kGroupFeatures); i += 32)
        reinterpret_cast<Element*>(tile.bias)[i] = static_cast<const Element*>(p.bias)[feature + i];
    ptx_ops::arrive(shared.tiles.full[published.slot()]);
    published.advance();
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
        stages.wait_empty(shared.stages);
        if (leader) copy(tile, (tile.first_step + k) * Config::kStepK);
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
    const uint32_t staging = ptx_ops::shared_address(this->shared.staging);
    for (int i = skipped; i < end; ++i)
      ptx_ops::tma_store(&p.out, staging + (i - skipped) * p.block_q * Config::kRowBytes,
                         {column, tile.row[i], tile.head, tile.batch});
  }
};

}  // namespace flashomni::cuda::sm90
