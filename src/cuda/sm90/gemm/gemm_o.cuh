// GEMM-O on the device, Update and Dispatch: what a tile is, and who does what with it. A tile is 128 tokens
// by 256 output features; the reduction visits the heads that the bits name, then the columns past the heads.
#pragma once

#include <cuda.h>

#include "flashomni/gemm.h"
#include "src/cuda/common/bits.cuh"
#include "src/cuda/sm90/gemm/consumer.cuh"
#include "src/cuda/sm90/gemm/kernel.cuh"

namespace flashomni::cuda::sm90 {

struct OTile {
  // First of the heads that are cached, which an Update stores; then of the active ones and the columns past
  // the heads. steps[0] = kNoMoreWork ends the loop.
  int steps[2];
  int stores;       // 2: after both stretches; 1: after the last only
  int row, column;  // first token, below 0 where rows lie before the matrix; first output feature
  int writes;       // bit i: consumer i's rows are written at the end
  int caches;       // bit i: and after the first stretch
  int panels;       // of 64 features: 4, or 2 of a halved tile
  int order, batch;
  int block;  // of the joint sequence, of consumer 0's rows
  unsigned char bias[GemmSizes::kWide * 2];
};

struct OParameters {
  CUtensorMap o[kMaxOrder + 1], weight;     // by heads
  CUtensorMap o_past, weight_past;          // the columns past the heads
  OutputMatrix cached[kMaxOrder + 1], out;  // cached: a Dispatch reads it
  Bits cache;
  int* counter;               // of claims
  const void* bias;           // Update: one a feature, or null
  const float* coefficients;  // Dispatch; null: an Update
  int64_t coefficient_stride;
  uint64_t weight_policy;
  int orders, heads, head_dim, past;  // past: columns past the heads
  int block_q, first_block, rows, row_offset;
  int row_tiles, batch, features;
  // A cluster's blocks take neighbouring tiles of the same rows: an item. Those past `kept` are halves.
  int sharers, items, kept;
  bool keeps_rows;  // those of row blocks without an active head: a Dispatch's, an Update's of cached tensors

  __host__ __device__ bool dispatches() const { return coefficients != nullptr; }
  /// Whether the matrix has any of the 64 rows from `row` on.
  __device__ bool has_rows(int row) const { return row > -64 && row < rows; }
  /// Steps that a head takes, and the columns past the heads.
  __device__ int head_steps() const { return (head_dim + GemmSizes::kStepK - 1) / GemmSizes::kStepK; }
  __device__ int past_steps() const { return (past + GemmSizes::kStepK - 1) / GemmSizes::kStepK; }
  /// Rows of tiles: a Dispatch has one at a place, an Update one of every order.
  __host__ __device__ int tile_rows() const {
    return row_tiles * batch * (coefficients != nullptr ? 1 : orders);
  }
  __host__ __device__ int item_columns(int tiles) const {
    return (features + tiles * GemmSizes::kWide - 1) / (tiles * GemmSizes::kWide);
  }
};

/// The bits of a tile's two halves of 64 rows, which lie in one row block of 128 or in two of 64.
struct TileHeads {
  const OParameters& p;
  const OTile& tile;

  /// Heads [32 w, 32 w + 32) of one half: the active or the cached ones.
  __device__ uint32_t word(int w, int half, bool active) const {
    if (!p.has_rows(tile.row + 64 * half)) return 0;
    const int block = tile.block + (p.block_q == 64 ? half : 0);
    const uint32_t bits = p.cache.word(tile.batch, int64_t(block) * p.heads + kBitsAWord * w);
    return (active ? bits : ~bits) & low_bits(p.heads - kBitsAWord * w);
  }
  __device__ int words() const { return (p.heads + kBitsAWord - 1) / kBitsAWord; }
  /// Heads that either half has.
  __device__ int count(bool active) const {
    int heads = 0;
    for (int w = 0; w < words(); ++w) heads += __popc(word(w, 0, active) | word(w, 1, active));
    return heads;
  }
  /// Bit i: whether rows of half i are there.
  __device__ int present() const { return p.has_rows(tile.row) | p.has_rows(tile.row + 64) << 1; }
  /// The same of those that are not kept.
  __device__ int not_kept() const {
    if (!p.keeps_rows) return present();
    int halves = 0;
    for (int w = 0; w < words(); ++w) halves |= (word(w, 0, true) != 0) | (word(w, 1, true) != 0) << 1;
    return halves;
  }
};

/// Claims tiles ahead of the other warps and tells them.
template <class Config>
struct OScheduler : GemmScheduler<Config> {
  using Element = typename Config::Element;
  static constexpr int kBand = 16;  // row tiles that share the weight's features in the cache
  const OParameters& p;

  __device__ OScheduler(typename Config::Shared& shared, const OParameters& p)
      : GemmScheduler<Config>{shared, p.counter, p.sharers}, p(p) {}

  __device__ void run() {
    bool published = false;
    for (int item = this->first(); item < p.items; item = this->claim(p.items, published))
      published = publish(item);
    this->published.wait_empty_relaxed(this->shared.tiles);
    this->shared.tile[this->published.slot()].steps[0] = kNoMoreWork;
    this->hand_on();
  }

  /// Bands of row tiles, through all features before the next band. Order 0, which takes longest, comes
  /// first. False: nothing of the tile is written, and nobody hears of it.
  __device__ bool publish(int item) {
    const int lane = ptx_ops::lane_index(), rank = ptx_ops::cluster_rank();
    const int half = item < p.kept ? -1 : (item - p.kept) % 2,
              index = half < 0 ? item : p.kept + (item - p.kept) / 2;
    const int width = half < 0 ? Config::kWide : Config::kWide / 2;
    const int rows = p.tile_rows(), in_a_band = kBand * p.item_columns(p.sharers);
    const int band = index / in_a_band, in_band = index % in_a_band, height = min(kBand, rows - band * kBand);
    const int row = band * kBand + in_band % height;
    const int column = (in_band / height * Config::kWide + max(half, 0) * width) * p.sharers + rank * width;
    this->published.wait_empty_relaxed(this->shared.tiles);
    OTile& tile = this->shared.tile[this->published.slot()];
    if (lane == 0) {
      const int place = row % (p.row_tiles * p.batch), blocks_a_tile = Config::kNarrow / p.block_q;
      tile.order = row / (p.row_tiles * p.batch), tile.panels = width / 64;
      tile.batch = place / p.row_tiles, tile.column = column;
      tile.block = p.first_block + place % p.row_tiles * blocks_a_tile;
      tile.row = tile.block * p.block_q - p.row_offset;
      const TileHeads heads{p, tile};
      const bool main = tile.order == 0;
      tile.steps[0] = p.dispatches() ? 0 : heads.count(false) * p.head_steps();
      tile.steps[1] = main ? heads.count(true) * p.head_steps() + p.past_steps() : 0;
      tile.caches = main && !p.dispatches() ? heads.not_kept() : 0;
      tile.stores = tile.caches != 0 ? 2 : 1;
      tile.writes = main && !p.dispatches() ? heads.present() : heads.not_kept();
    }
    __syncwarp();
    if (tile.writes == 0) return false;
    if (p.bias != nullptr)
      for (int i = lane; i < min(p.features - column, Config::kWide); i += 32)
        reinterpret_cast<Element*>(tile.bias)[i] = static_cast<const Element*>(p.bias)[column + i];
    this->hand_on();
    return true;
  }
};

/// Walks a tile's heads and keeps the stages full. Of a Dispatch, what is added comes first: each consumer's
/// rows of cached[i] in a stage of their own.
template <class Config>
struct OLoader {
  typename Config::Shared& shared;
  const OParameters& p;
  const bool leader = ptx_ops::elect_one();
  const int rank = ptx_ops::cluster_rank();
  RingCursor<Config::kTileSlots> tiles;
  RingCursor<Config::kStages> stages;
  int left = 0;  // steps of the tile, cached tensors not counted

  __device__ OLoader(typename Config::Shared& shared, const OParameters& p) : shared(shared), p(p) {}

  __device__ void run() {
    for (;; tiles.advance()) {
      tiles.wait_full(shared.tiles);
      const OTile& tile = shared.tile[tiles.slot()];
      if (tile.steps[0] == kNoMoreWork) return;
      left = tile.steps[0] + tile.steps[1];
      if (left < Config::kStepsAhead) ask();
      if (p.dispatches())
        load_cached(tile);
      else
        load_heads(tile, false);
      if (tile.order == 0) {
        load_heads(tile, true);
        for (int column = 0; column < p.past; column += Config::kStepK)
          load_step(p.o_past, p.weight_past, tile, {column, 0, 0, 0}, tile.writes);
      }
      ptx_ops::arrive(shared.tiles.empty[tiles.slot()]);
    }
  }

  /// Rank 0's, who claims for both.
  __device__ void ask() {
    if (leader && rank == 0) ptx_ops::arrive(shared.asked);
  }

  __device__ void load_cached(const OTile& tile) {
    for (int i = 0; i < p.orders; ++i) {
      if (shared.coefficient[i] == 0) continue;
      for (int consumer = 0; consumer < Config::kConsumers; ++consumer, stages.advance()) {
        stages.wait_empty(shared.stages);
        if (!leader) continue;
        uint64_t& full = shared.stages.full[stages.slot()];
        const uint32_t to = ptx_ops::shared_address(shared.stage[stages.slot()]);
        shared.step[stages.slot()] = 1u << consumer;
        ptx_ops::arrive_expect_bytes(full, tile.panels * 64 * Config::kRowBytes);
        for (int panel = 0; panel < tile.panels; ++panel)
          ptx_ops::tma_load(to + panel * 64 * Config::kRowBytes, &p.cached[i].map, full,
                            {tile.column + 64 * panel, tile.row + 64 * consumer, 0, tile.batch},
                            ptx_ops::kEvictFirst);
      }
    }
  }

  __device__ void load_heads(const OTile& tile, bool active) {
    const TileHeads heads{p, tile};
    for (int w = 0; w < heads.words(); ++w) {
      const uint32_t first = heads.word(w, 0, active), second = heads.word(w, 1, active);
      for (uint32_t either = first | second; either != 0; either &= either - 1) {
        const int bit = __ffs(either) - 1;
        const uint32_t consumers = (first >> bit & 1) | (second >> bit & 1) << 1;
        for (int column = 0; column < p.head_dim; column += Config::kStepK)
          load_step(p.o[tile.order], p.weight, tile, {column, 0, kBitsAWord * w + bit, 0}, consumers);
      }
    }
  }

  /// 64 columns from `at` on, of the rows of the consumers that multiply them, and of the weight. Columns
  /// past the head come as zeros. The rows are the whole cluster's: of two blocks each loads one consumer's.
  __device__ void load_step(const CUtensorMap& o, const CUtensorMap& weight, const OTile& tile,
                            ptx_ops::BoxStart at, uint32_t consumers) {
    if (left-- == Config::kStepsAhead) ask();
    stages.wait_empty(shared.stages);
    if (leader) {
      uint64_t& full = shared.stages.full[stages.slot()];
      const uint32_t to = ptx_ops::shared_address(shared.stage[stages.slot()]);
      shared.step[stages.slot()] = consumers;
      ptx_ops::arrive_expect_bytes(full, (tile.panels + __popc(consumers)) * 64 * Config::kRowBytes);
#pragma unroll
      for (int i = 0; i < Config::kConsumers; ++i) {
        const ptx_ops::BoxStart rows{at.column, tile.row + 64 * i, at.head, tile.batch};
        if (!(consumers >> i & 1)) continue;
        if (p.sharers == 1)
          ptx_ops::tma_load(to + i * 64 * Config::kRowBytes, &o, full, rows, ptx_ops::kEvictNormal);
        else if (i == rank)
          ptx_ops::tma_load_to(0b11, to + i * 64 * Config::kRowBytes, &o, full, rows, ptx_ops::kEvictNormal);
      }
      for (int i = 0; i < tile.panels / 2; ++i)
        ptx_ops::tma_load(to + Config::kNarrowBytes + i * 128 * Config::kRowBytes, &weight, full,
                          {at.column, tile.column + 128 * i, at.head, 0}, p.weight_policy);
    }
    stages.advance();
  }
};

template <class Config>
struct OStorer : GemmStorer<Config> {
  const OParameters& p;

  __device__ OStorer(typename Config::Shared& shared, const OParameters& p)
      : GemmStorer<Config>{shared}, p(p) {}

  __device__ void run() {
    for (;;) {
      this->tiles.wait_full(this->shared.tiles);
      const OTile& tile = this->shared.tile[this->tiles.slot()];
      if (tile.steps[0] == kNoMoreWork) break;
      if (tile.stores == 2) this->store_both([&](int consumer) { copy(p.cached[0], tile, consumer, tile.caches); });
      const OutputMatrix& last = tile.order == 0 ? p.out : p.cached[tile.order];
      this->store_both([&](int consumer) { copy(last, tile, consumer, tile.writes); });
      this->release_tile();
    }
    this->finish();
  }

  __device__ void copy(const OutputMatrix& out, const OTile& tile, int consumer, int consumers) {
    if (!(consumers >> consumer & 1)) return;
    const int row = tile.row + 64 * consumer;
    for (int panel = 0; panel < tile.panels; ++panel) {
      const int column = tile.column + 64 * panel;
      if (column < p.features)
        out.store(this->shared.staging + panel * 64 * Config::kRowBytes, 64, {column, row, 0, tile.batch},
                  this->leader);
    }
  }
};

}  // namespace flashomni::cuda::sm90
