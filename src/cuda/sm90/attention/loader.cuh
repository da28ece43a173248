// The loader warp: feeds the ring with the blocks of K and V that a tile's bits select, and with their masks.
#pragma once

#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/tma.cuh"
#include "src/cuda/sm90/attention/config.cuh"

namespace flashomni::cuda::sm90 {

/// Yields the pieces of a tile: of whole blocks first, then of those that need a mask; each from the last to
/// the first. Lane i of the warp holds word i of a chunk of the tile's bits; the manager has just read them.
template <class Config>
struct Pieces {
  static constexpr int kChunk = 32;  // words
  static constexpr bool kHalves = Config::kStep < 128;  // a block may be two pieces
  const Problem& problem;
  const Tile& tile;
  bool partial = false;
  int chunk, half = 0, block = 0;             // chunk: of the bits that `words` holds; half: pieces left of block
  uint32_t words = 0, word = 0, waiting = 0;  // this lane's word; the current word; a bit a word still to come
  int base = 0;                               // first block of the current word

  __device__ Pieces(const Problem& problem, const Tile& tile)
      : problem(problem), tile(tile), chunk(chunks(TileBlocks(problem, tile))) {}

  /// The position of the next piece in its sequence. There must be one.
  __device__ int next() {
    if (kHalves && half > 0) return block * problem.block_kv + --half * Config::kStep;
    while (word == 0) next_word();
    const int bit = 31 - __clz(word);
    word ^= 1u << bit;
    block = base + bit;
    if (kHalves && problem.block_kv > Config::kStep) half = 1;
    return block * problem.block_kv + half * Config::kStep;
  }

 private:
  __device__ static int chunks(const TileBlocks& blocks) { return (blocks.words() + kChunk - 1) / kChunk; }
  __device__ void next_word() {
    while (waiting == 0) fetch();
    const int source = 31 - __clz(waiting);
    waiting ^= 1u << source;
    word = __shfl_sync(ptx_ops::kWholeWarp, words, source);
    base = (chunk * kChunk + source) * kBitsAWord;
  }
  __device__ void fetch() {
    const TileBlocks blocks(problem, tile);
    if (chunk == 0) partial = true, chunk = chunks(blocks);
    --chunk;
    const int w = chunk * kChunk + ptx_ops::lane_index();
    words = 0;
    if (w < blocks.words()) {
      const uint32_t mask = blocks.partial(problem, w);
      words = blocks.selected(problem, w) & (partial ? mask : ~mask);
    }
    waiting = __ballot_sync(ptx_ops::kWholeWarp, words != 0);
  }
};

/// Walks a tile's blocks and keeps the ring full. The ring hides a tile's beginning only if a step costs this warp
/// less than the consumers: what whole blocks do not need stands apart.
template <class Config>
struct Loader {
  using Shared = typename Config::Shared;
  static constexpr int kStep = Config::kStep, kPanels = Config::kPanels;

  Shared& shared;
  const AttentionParameters& p;
  const int lane = threadIdx.x % 32;
  const bool leader = ptx_ops::elect_one();
  RingCursor<Config::kTileSlots> tiles;
  RingCursor<Config::kRingSlots> blocks;
  RingCursor<Config::kMaskSlots> masks;
  uint32_t landing_phase = 0;

  /// What one step reads: one or two runs of keys.
  struct Step {
    int row[2];  // first token of each run
    int valid;   // if dirty: how many of each run's slots hold keys, the second's 16 bits up
    int head, batch;
    bool summary, dirty;  // dirty: slots without keys may hold what is not ours, and are zeroed
  };
  Step pending;  // its V is still to be loaded
  bool has_pending = false, after_part = false, nothing = Config::kBeginsBetween;  // nothing: as pending
  uint32_t silent = 0;  // a bit a block whose summary does not count: those that are selected or do not exist

  __device__ Loader(Shared& shared, const AttentionParameters& p) : shared(shared), p(p) {}

  __device__ int run_rows() const { return min(p.problem.block_kv, kStep); }
  __device__ bool two_runs() const { return kStep == 128 && p.problem.block_kv < kStep; }

  __device__ void copy(const CUtensorMap& map, const Step& step, uint64_t& barrier) {
    const uint32_t to = ptx_ops::shared_address(shared.ring[blocks.slot()]);
    ptx_ops::arrive_expect_bytes(barrier, Config::kStepBytes);
    if (Config::kReadsPanels && !two_runs()) {
      ptx_ops::tma_load_panels(to, &map, barrier, {step.row[0], 0, step.head, step.batch}, ptx_ops::kEvictLast);
      return;
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      copy_panel(to + panel * kStep * 128, map, panel, step, step.row[0], barrier);
      if (two_runs()) copy_panel(to + (panel * kStep + kStep / 2) * 128, map, panel, step, step.row[1], barrier);
    }
  }
  __device__ void copy_panel(uint32_t to, const CUtensorMap& map, int panel, const Step& step, int row,
                             uint64_t& barrier) {
    if constexpr (Config::kReadsPanels)
      ptx_ops::tma_load_panels(to, &map, barrier, {row, panel, step.head, step.batch}, ptx_ops::kEvictLast);
    else
      ptx_ops::tma_load(to, &map, barrier, {64 * panel, row, step.head, step.batch}, ptx_ops::kEvictLast);
  }

  // V follows the K of the next step, of the next tile too: the order in which the consumers need them.
  __device__ void load_pending_v() {
    if (nothing) load_nothing();
    if (!has_pending) return;
    has_pending = false;
    load(pending.summary ? p.v_mean : p.v, pending);
  }

  /// A block that nobody has written: the V of a tile of nothing.
  __device__ void load_nothing() {
    if (leader) ptx_ops::arrive(shared.blocks.full[blocks.slot()]);
    blocks.advance();
    nothing = false;
  }

  __device__ void load(const CUtensorMap& map, const Step& step) {
    blocks.wait_empty(shared.blocks);
    uint64_t& full = shared.blocks.full[blocks.slot()];
    if (leader) copy(map, step, step.dirty ? shared.landing : full);
    if (step.dirty) [[unlikely]] clean(step, full);
    blocks.advance();
  }
  /// Neither -inf in a mask nor a probability of 0 silences a NaN: blocks are handed on when their slots without
  /// keys are zero.
  __device__ void clean(const Step& step, uint64_t& full) {
    ptx_ops::wait_parity(shared.landing, landing_phase);
    landing_phase ^= 1;
    zero_rows(step.valid & 0xffff, run_rows());
    if (two_runs()) zero_rows(kStep / 2 + (step.valid >> 16), kStep);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
    if (leader) ptx_ops::arrive(full);
  }
  __device__ void zero_rows(int first, int last) {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared.ring[blocks.slot()]);
    for (int panel = 0; panel < kPanels; ++panel)
      for (int row = first; row < last; ++row) words[(panel * kStep + row) * 32 + lane] = 0;
  }

  /// Publishes a mask: term(column) for every column, and the causal limits of both halves.
  template <class Term>
  __device__ void publish_mask(Term term, int limit0, int limit1) {
    masks.wait_empty(shared.masks);
    auto& mask = shared.mask[masks.slot()];
#pragma unroll
    for (int column = lane; column < kStep; column += 32) mask.term[column] = term(column);
    if (lane == 0) mask.limit[0] = limit0, mask.limit[1] = limit1;
    ptx_ops::arrive(shared.masks.full[masks.slot()]);
    masks.advance();
  }

  __device__ int block_length(const Tile& of, int block) const {
    const int slots = min(of.kv_tokens - block * p.problem.block_kv, p.problem.block_kv);
    return p.problem.block_len != nullptr ? min(max(p.problem.block_len[block], 0), slots) : slots;
  }
  /// Keys in the piece at `position`.
  __device__ int piece_length(const Tile& of, int position) const {
    const int block = p.problem.whole_kv_blocks(position), within = position & (p.problem.block_kv - 1);
    return min(max(block_length(of, block) - within, 0), run_rows());
  }

  /// A skipped block weighs as many keys as it holds. One read of the bits, a word a lane, serves some steps.
  __device__ void mask_summaries(const Tile& tile, int first_block, bool first_of_tile) {
    const int word = first_block / kBitsAWord;
    if (first_of_tile || word % 32 == 0) {
      const TileBlocks of(p.problem, tile);
      const int w = word / 32 * 32 + lane;
      silent = of.selected(p.problem, w) | ~low_bits(of.kv_blocks - kBitsAWord * w);
    }
    const auto term = [&](int column) {
      const uint32_t bits = __shfl_sync(ptx_ops::kWholeWarp, silent, (word + column / kBitsAWord) % 32);
      const int length = bits >> lane & 1 ? 0 : block_length(tile, first_block + column);
      return length > 0 ? __log2f(length) : -INFINITY;
    };
    publish_mask(term, kEverythingSeen, kEverythingSeen);
  }

  __device__ void mask_blocks(const Tile& tile, const Step& step, int position0, int position1) {
    const int diagonal = TileBlocks(p.problem, tile).diagonal;
    const auto term = [&](int column) {
      const bool second = two_runs() && column >= kStep / 2;
      return column - (second ? kStep / 2 : 0) < (second ? step.valid >> 16 : step.valid & 0xffff) ? 0.0f : -INFINITY;
    };
    const int limit0 = p.problem.causal ? diagonal - position0 : kEverythingSeen;
    const int limit1 = two_runs() ? diagonal - position1 : limit0 - 64;
    publish_mask(term, limit0, p.problem.causal ? limit1 : kEverythingSeen);
  }

  __device__ void walk(const Tile& tile) {
    Pieces<Config> pieces(p.problem, tile);
    const int pieces_before = min(tile.first * (two_runs() ? 2 : 1), tile.pieces);
    for (int i = 0; i < pieces_before; ++i) pieces.next();
    int left = tile.pieces - pieces_before;
    const int steps = tile.steps, whole = steps - tile.masked, kv_row = tile.kv_row;
    Step step{};
    step.head = tile.kv_head, step.batch = p.problem.q_indptr != nullptr ? 0 : tile.batch;
    for (int n = 0; n < steps; ++n) {
      if (n == steps - Config::kStepsAhead) tell_near_end();
      if (n < whole) [[likely]] {
        step.row[0] = kv_row + pieces.next(), --left;
        if (two_runs()) step.row[1] = kv_row + pieces.next(), --left;
      } else {
        take_masked(tile, n - (steps - tile.summaries), pieces, left, step);
      }
      load(step.summary ? p.k_mean : p.k, step);
      load_pending_v();
      pending = step, has_pending = true;
    }
  }

  /// A step that needs a mask: summaries, of which `summary` says which step it is, or pieces where that is below 0.
  __device__ void take_masked(const Tile& tile, int summary, Pieces<Config>& pieces, int& left, Step& step) {
    step.summary = summary >= 0, step.dirty = false;
    if (step.summary) {
      step.row[0] = (tile.summaries_before + summary) * kStep, step.row[1] = step.row[0] + kStep / 2;
      mask_summaries(tile, step.row[0], summary == 0);
      return;
    }
    const int position0 = pieces.next();
    const bool lone = --left == 0;  // the last of an odd number: beside it any keys, none of which counts
    int position1 = position0;
    if (two_runs() && !lone) position1 = pieces.next(), --left;
    step.row[0] = tile.kv_row + position0, step.row[1] = tile.kv_row + position1;
    const int valid0 = piece_length(tile, position0), valid1 = lone ? 0 : piece_length(tile, position1);
    step.valid = valid0 | valid1 << 16;
    step.dirty = p.problem.q_indptr != nullptr || p.problem.block_len != nullptr;
    mask_blocks(tile, step, position0, position1);
  }

  __device__ void tell_near_end() {
    if (leader) atomicAdd(&shared.near_end, 1);
  }

  __device__ void take_nothing() {
    tiles.wait_full(shared.tiles);
    __syncwarp();
    if (leader) ptx_ops::arrive(shared.tiles.empty[tiles.slot()]);
    tiles.advance();
    tell_near_end();
  }

  __device__ void run() {
    if (nothing) take_nothing();
    for (;; tiles.advance()) {
      tiles.wait_full(shared.tiles);
      const Tile& tile = shared.tile[tiles.slot()];
      if (tile.steps == kNoMoreTiles) return load_pending_v();
      // Where the consumers do not overlap two tiles, they want the first one's V before the second one's K.
      if (!Config::kOverlapsTiles || after_part || tile.steps == tile.masked) load_pending_v();
      after_part = tile.parts > 1;
      if (tile.steps < Config::kStepsAhead) tell_near_end();
      walk(tile);
      __syncwarp();
      if (leader) ptx_ops::arrive(shared.tiles.empty[tiles.slot()]);
    }
  }
};

}  // namespace flashomni::cuda::sm90
