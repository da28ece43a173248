// The manager warp: schedules tiles, loads their queries and stores their outputs. Only this warp and the loader know
// of sparsity.
#pragma once

#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/tma.cuh"
#include "src/cuda/sm90/attention/config.cuh"
#include "src/cuda/sm90/attention/split.cuh"

namespace flashomni::cuda::sm90 {

/// Claims tiles ahead of the other warps, reads their bits and publishes both; sends finished outputs off, each of
/// which makes room for the next query.
template <class Config>
struct Manager {
  using Shared = typename Config::Shared;

  Shared& shared;
  const AttentionParameters& p;
  const bool leader = ptx_ops::elect_one(), ragged = p.problem.q_indptr != nullptr;
  RingCursor<Config::kTileSlots> published, stored, to_query;
  RingCursor<Config::kQuerySlots> queries, outputs;
  int free_queries = Config::kQuerySlots, tiles_to_query = 0;  // published tiles whose query is not on its way
  int claimed = blockIdx.x;  // the next work to publish
  Split split{0, 0, 1};
  int patient_from = 0;   // from this work on, a tile is claimed when the one before it is nearly loaded
  int tiles_published = 0;
  bool has_claim = true;

  __device__ Manager(Shared& shared, const AttentionParameters& p) : shared(shared), p(p) {}

  __device__ void run() {
    bool nothing = Config::kBeginsBetween;  // waits too
    if (nothing) publish_nothing();
    const int work = survey();
    int waiting = 0;  // tiles published and not yet stored
    for (bool more = true; more || waiting > 0 || nothing;) {
      while (more && waiting < (claimed < patient_from ? Config::kTilesAhead : 2)) {
        if (!has_claim) {
          await_loader();
          claim();
        }
        more = claimed < work;
        publish(more);
        waiting += more, tiles_to_query += more;
        load_queries();
      }
      if (nothing || waiting > 0) store(), waiting -= !nothing, nothing = false;
      load_queries();
    }
    if (leader) ::cuda::ptx::cp_async_bulk_wait_group(::cuda::ptx::n32_t<0>{});
  }

  __device__ void await_loader() const {
    while (atomicAdd(&shared.near_end, 0) < tiles_published) __nanosleep(200);
  }

  /// Lane r gets what region r of the list holds. Returns how many tiles come before the region's end.
  __device__ int region_end(Region& region) const {
    const int lane = ptx_ops::lane_index();
    region = lane < p.grouping.regions ? p.control->region[lane] : Region{0, 0, 0};
    int end = region.items;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(ptx_ops::kWholeWarp, end, distance);
      if (lane >= distance) end += before;
    }
    return end;
  }

  /// Decides how tiles are split; returns the number of tiles and parts in all.
  __device__ int survey() {
    Region region;
    const int tiles = __shfl_sync(ptx_ops::kWholeWarp, region_end(region), 31);
    const float blocks = __reduce_add_sync(ptx_ops::kWholeWarp, region.blocks);
    const int steps = static_cast<int>(__fdividef(blocks, max(tiles, 1)) * p.problem.block_kv / Config::kStep);
    split = Split(tiles, steps, gridDim.x);
    const int work = split.work(tiles), longest = __reduce_max_sync(ptx_ops::kWholeWarp, region.longest);
    // Where lists differ, a CTA that holds several long tiles keeps them from those that are free.
    const bool uneven = longest * static_cast<float>(tiles) > 1.25f * blocks;
    patient_from = uneven ? 0 : work;
    return work;
  }

  /// The list is short and stays in the L1 cache: to look again is cheaper than to keep registers.
  __device__ Item item(int tile) const {
    Region region;
    const int end = region_end(region), mine = __ffs(__ballot_sync(ptx_ops::kWholeWarp, tile < end)) - 1;
    const int before = __shfl_sync(ptx_ops::kWholeWarp, end - region.items, mine);
    return p.items[p.grouping.base(p.problem, mine) + tile - before];
  }

  /// A tile of one step, of which nothing is loaded or stored.
  __device__ void publish_nothing() {
    Tile& tile = shared.tile[published.slot()];
    if (leader) tile.steps = tile.parts = 1, tile.masked = tile.rows = 0;
    if (leader) ptx_ops::arrive(shared.queries[queries.slot()]);
    __syncwarp();
    ptx_ops::arrive(shared.tiles.full[published.slot()]);
    published.advance(), to_query.advance(), queries.advance();
    --free_queries, ++tiles_published;
  }

  __device__ void publish(bool more) {
    published.wait_empty_relaxed(shared.tiles);
    Tile& tile = shared.tile[published.slot()];
    if (more) {
      const int beyond = max(claimed - split.whole, 0);
      const bool is_part = claimed >= split.whole;
      const int index = is_part ? split.whole + beyond / split.parts : claimed;
      describe(tile, item(index), is_part ? beyond % split.parts : 0, is_part ? split.parts : 1,
               index - split.whole);
    } else {
      tile.steps = kNoMoreTiles, tile.masked = 0;
    }
    __syncwarp();  // lane 0 wrote; store() reads in all lanes
    ptx_ops::arrive(shared.tiles.full[published.slot()]);
    published.advance();
    ++tiles_published;
    has_claim = false;
    if (more && claimed < patient_from) claim();
  }

  __device__ void claim() {
    if (leader) claimed = gridDim.x + atomicAdd(&p.control->next, 1);
    claimed = __reduce_max_sync(ptx_ops::kWholeWarp, claimed);  // claims only grow
    has_claim = true;
  }

  __device__ void describe(Tile& tile, Item item, int part, int parts, int split_tile) {
    const int batch = item.batch_head / p.problem.heads, head = item.batch_head % p.problem.heads;
    const Sequence sequence = p.problem.sequence(batch);
    const TileBlocks blocks(p.problem, sequence.q_tokens, sequence.kv_tokens, batch, head, item.q_block);
    const int lane = ptx_ops::lane_index();
    int masked = 0, whole = 0, skipped = 0;
#pragma unroll 1
    for (int w = lane; w < blocks.words(); w += 32) {
      const uint32_t selected = blocks.selected(p.problem, w), partial = blocks.partial(p.problem, w);
      masked += __popc(selected & partial);
      whole += __popc(selected & ~partial);
      skipped += __popc(~selected & low_bits(blocks.kv_blocks - kBitsAWord * w));
    }
    masked = __reduce_add_sync(ptx_ops::kWholeWarp, masked);
    whole = __reduce_add_sync(ptx_ops::kWholeWarp, whole);
    skipped = __reduce_add_sync(ptx_ops::kWholeWarp, skipped);
    if (lane != 0) return;
    // A piece is what one block gives one step: steps of 128 keys take two blocks of 64, steps of 64 half a
    // block of 128.
    const int keys = p.problem.block_kv;
    const int pieces_a_block = keys > Config::kStep ? keys / Config::kStep : 1;
    const int pieces_a_step = keys < Config::kStep ? Config::kStep / keys : 1;
    masked *= pieces_a_block, whole *= pieces_a_block;
    const int summaries =
        p.problem.summaries && skipped > 0 ? (blocks.kv_blocks + Config::kStep - 1) / Config::kStep : 0;
    const int steps = (masked + whole + pieces_a_step - 1) / pieces_a_step + summaries;
    const int first = steps * part / parts, last = steps * (part + 1) / parts;
    tile.steps = last - first, tile.first = first;
    tile.masked = min(last - first, max(last - whole / pieces_a_step, 0));
    tile.summaries = min(last - first, max(last - (steps - summaries), 0));
    tile.pieces = masked + whole, tile.summaries_before = max(first - (steps - summaries), 0);
    tile.part = part, tile.parts = parts, tile.split = split_tile;
    tile.q_block = item.q_block, tile.head = head, tile.kv_head = head / p.kv_group, tile.batch = batch;
    tile.rows = min(sequence.q_tokens - item.q_block * Config::kBlockQ, Config::kBlockQ);
    tile.q_row = sequence.q_row + item.q_block * Config::kBlockQ, tile.kv_row = sequence.kv_row;
    tile.q_tokens = sequence.q_tokens, tile.kv_tokens = sequence.kv_tokens;
  }

  /// Of tiles that are published, as long as there are buffers.
  __device__ void load_queries() {
    for (; free_queries > 0 && tiles_to_query > 0; --free_queries, --tiles_to_query) {
      const Tile& tile = shared.tile[to_query.slot()];
      if (leader) load_query(tile);
      to_query.advance();
      queries.advance();
    }
  }
  __device__ void load_query(const Tile& tile) const {
    uint64_t& full = shared.queries[queries.slot()];
    ptx_ops::arrive_expect_bytes(full, Config::kQueryBytes);
    for (int i = 0; i < Config::kConsumers; ++i)
#pragma unroll
      for (int panel = 0; panel < Config::kPanels; ++panel)
        ptx_ops::tma_load(
            ptx_ops::shared_address(shared.query[queries.slot()][i]) + panel * Config::kConsumerRows * 128, &p.q, full,
            {64 * panel, tile.q_row + i * Config::kConsumerRows, tile.head, ragged ? 0 : tile.batch},
            ptx_ops::kEvictFirst);
  }

  /// Sends the oldest unstored tile's output off; its query buffer is free then.
  __device__ void store() {
    const auto& tile = shared.tile[stored.slot()];
    const int row = tile.q_row, rows = tile.rows, head = tile.head, batch = ragged ? 0 : tile.batch;
    const bool whole = tile.parts == 1 && rows > 0;  // of a split tile, a consumer writes the output
    ptx_ops::named_barrier_sync(kOutputStaged0 + outputs.slot(), Config::kStoreThreads);
    if (!whole) {
    } else if (ragged && rows < Config::kBlockQ) {
      store_rows(row, rows, head);
    } else if (leader) {
      for (int i = 0; i < Config::kConsumers; ++i)
#pragma unroll
        for (int panel = 0; panel < Config::kPanels; ++panel)
          ptx_ops::tma_store(
              &p.out,
              ptx_ops::shared_address(shared.query[outputs.slot()][i]) + panel * Config::kConsumerRows * 128,
              {64 * panel, row + i * Config::kConsumerRows, head, batch});
      ::cuda::ptx::cp_async_bulk_commit_group();
      ::cuda::ptx::cp_async_bulk_wait_group_read(::cuda::ptx::n32_t<0>{});
    }
    __syncwarp();
    outputs.advance();
    ++free_queries;
    stored.advance();
  }

  /// Row by row: what follows them in `out` is the next sequence's.
  __device__ void store_rows(int first_row, int rows, int head) {
    using Chunk = uint4;  // 8 columns
    const int lane = ptx_ops::lane_index();
    for (int row = 0; row < rows; ++row) {
      if (8 * lane >= p.head_dim) continue;
      const auto* buffer = reinterpret_cast<const Chunk*>(shared.query[outputs.slot()][row / Config::kConsumerRows]);
      const int r = row % Config::kConsumerRows;
      const Chunk chunk = buffer[(lane / 8 * Config::kConsumerRows + r) * 8 + ((lane % 8) ^ (r % 8))];
      const int64_t at = (first_row + row) * p.out_token_stride + head * p.out_head_stride + 8 * lane;
      *reinterpret_cast<Chunk*>(p.out_data + at * 2) = chunk;
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);  // the copy engine writes the buffer next
  }
};

}  // namespace flashomni::cuda::sm90
