// GEMM-Q on the device: what a tile is, and who does what with it. Only features of one head meet tokens of
// that head's active row blocks, any of them: 256 tokens a tile however the pattern lies.
#pragma once

#include <cuda.h>

#include "flashomni/gemm.h"
#include "src/cuda/sm90/gemm/consumer.cuh"
#include "src/cuda/sm90/gemm/kernel.cuh"
#include "src/cuda/sm90/gemm/gemm_q_plan.cuh"

namespace flashomni::cuda::sm90 {

inline constexpr int kMostBlocks = 4;       // row blocks a tile: 2 of 128 tokens, or 4 of 64
inline constexpr int kGroupFeatures = 128;  // of a head, a tile
inline constexpr int kMostSharers = 2;      // blocks of a cluster

struct QTile {
  int steps;                     // kNoMoreWork ends the loop
  int row[kMostBlocks], blocks;  // first token of each row block, below 0 where rows lie before the matrix
  int feature, column, head, batch;  // feature: row of the weight; column: of the head
  bool wide;                         // more than 128 tokens
  bool one_panel;                    // 64 features or fewer: the consumers share them, and halve the tokens
  unsigned char bias[kGroupFeatures * 2];
};

struct QParameters {
  CUtensorMap x, weight;
  OutputMatrix out;
  QProblem problem;
  unsigned char* tables;  // the blocks' plans, where shared memory does not hold them; or null
  int* counter;           // of claims
  const void* bias;       // one a feature, or null
  uint64_t weight_policy;
  int steps, head_features;
  int sharers;
  bool shares_tokens;  // of a cluster, not the weight; of one block: by itself
  Activation activation;
};

/// Where this block's table lies.
template <class Config>
__device__ QPlan plan_of(typename Config::Shared& shared, const QParameters& p) {
  return QPlan(p.problem, p.tables == nullptr ? shared.plan.bytes
                                              : p.tables + blockIdx.x * QPlanStorage::needed(p.problem));
}

/// Claims tiles ahead of the other warps and tells them. A cluster's tiles share the tokens, of neighbouring
/// features, or the weight, the same 128 features: then each has half of the item's row blocks.
template <class Config>
struct QScheduler : GemmScheduler<Config> {
  using Element = typename Config::Element;
  const QParameters& p;
  const QPlan plan;

  __device__ QScheduler(typename Config::Shared& shared, const QParameters& p)
      : GemmScheduler<Config>{shared, p.counter, p.sharers}, p(p), plan(plan_of<Config>(shared, p)) {}

  __device__ void run() {
    const int items = plan.items(this->clusters());
    for (int item = this->first(); item < items; item = this->claim(items)) publish(plan.find(item, this->clusters()));
    this->published.wait_empty_relaxed(this->shared.tiles);
    this->shared.tile[this->published.slot()].steps = kNoMoreWork;
    this->hand_on();
  }

  __device__ void publish(QItem item) {
    const int lane = ptx_ops::lane_index(), rank = ptx_ops::cluster_rank();
    const int group = p.shares_tokens ? item.group * p.sharers + rank : item.group;
    if (!p.shares_tokens) (rank == 0 ? item.last : item.first) = item.first + (item.last - item.first + 1) / 2;
    const int blocks = item.last - item.first, column = group * kGroupFeatures;
    const int batch = item.list / p.problem.heads, head = item.list - batch * p.problem.heads;
    const int feature = head * p.head_features + column, features = p.head_features - column;
    this->published.wait_empty_relaxed(this->shared.tiles);
    QTile& tile = this->shared.tile[this->published.slot()];
    plan.write_rows(item.list, item.first, item.last, tile.row);
    if (lane == 0) {
      tile.steps = p.steps, tile.blocks = blocks;
      tile.feature = feature, tile.column = column, tile.head = head, tile.batch = batch;
      tile.wide = blocks * p.problem.block_q > 128, tile.one_panel = features <= 64;
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
        if (leader && rank == 0 && k == max(steps - Config::kStepsAhead, 0)) ptx_ops::arrive(shared.asked);
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
    ptx_ops::arrive_expect_bytes(full, (panels * 64 + tile.blocks * p.problem.block_q) * Config::kRowBytes);
    for (int i = 0; i < panels; ++i)
      load(!p.shares_tokens, i, weight + i * 64 * Config::kRowBytes, p.weight, full,
           {column, tile.feature + 64 * i, 0, 0}, p.weight_policy);
    for (int i = 0; i < tile.blocks; ++i)
      load(p.shares_tokens, i, tokens + i * p.problem.block_q * Config::kRowBytes, p.x, full,
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
    const int skipped = tile.one_panel ? consumer * (128 / p.problem.block_q) : 0;
    const int end = tile.one_panel ? min(tile.blocks, skipped + 128 / p.problem.block_q) : tile.blocks;
    const int column = tile.column + (tile.one_panel ? 0 : 64 * consumer);
    for (int i = skipped; i < end; ++i)
      p.out.store(this->shared.staging + (i - skipped) * p.problem.block_q * Config::kRowBytes, p.problem.block_q,
                  {column, tile.row[i], tile.head, tile.batch}, this->leader);
  }
};

}  // namespace flashomni::cuda::sm90
