// What symbols and lengths ask of the attention kernel, read on the device: by the plan, which orders the
// tiles, and by the scheduler, which turns a tile's bits into steps.
#pragma once

#include <cstdint>

#include "src/cuda/common/bits.cuh"

namespace flashomni::cuda::sm90 {

/// One batch element: where its tokens lie and how many there are.
struct Sequence {
  int q_row, q_tokens, kv_row, kv_tokens;
};

struct Problem {
  Bits cache, skip;
  const int32_t *q_indptr, *kv_indptr;  // null: a batch of equal sequences
  const int32_t* block_len;             // [kv_blocks] or null
  const uint32_t* partial;  // with block_len: a bit a block that holds fewer tokens than slots (the plan's)
  int batch, heads, q_tokens, kv_tokens;  // tokens of a sequence, or of the whole ragged batch
  int block_q, block_kv;  // 64 or 128
  bool causal, summaries;

  /// Blocks that `tokens` fill. By shifts: the divisors are known at run time only.
  __device__ int whole_kv_blocks(int tokens) const { return tokens >> (31 - __clz(block_kv)); }
  __device__ int kv_blocks(int tokens) const { return whole_kv_blocks(tokens + block_kv - 1); }
  __device__ int q_blocks(int tokens) const { return (tokens + block_q - 1) >> (31 - __clz(block_q)); }

  __device__ Sequence sequence(int b) const {
    if (q_indptr == nullptr) return {0, q_tokens, 0, kv_tokens};
    const auto range = [b](const int32_t* indptr, int tokens, int& row, int& length) {
      row = min(max(indptr[b], 0), tokens);
      length = min(max(indptr[b + 1], row), tokens) - row;
    };
    Sequence s;
    range(q_indptr, q_tokens, s.q_row, s.q_tokens);
    range(kv_indptr, kv_tokens, s.kv_row, s.kv_tokens);
    return s;
  }
};

/// The KV blocks of one tile (a query block of a head) as words of bits.
struct TileBlocks {
  int batch, kv_blocks, visible, whole;  // blocks that exist, that causal lets be seen, that all rows see whole
  int diagonal;  // last key position that the tile's first row sees, if causal
  int64_t first_bit;

  __device__ TileBlocks(const Problem& p, int q_tokens, int kv_tokens, int batch, int head, int q_block)
      : batch(batch) {
    kv_blocks = p.kv_blocks(kv_tokens);
    first_bit = (int64_t(q_block) * p.heads + head) * kv_blocks;
    const int first_row = q_block * p.block_q, last_row = min(first_row + p.block_q, q_tokens) - 1;
    diagonal = first_row + kv_tokens - q_tokens;
    visible = kv_blocks, whole = p.whole_kv_blocks(kv_tokens);
    if (p.causal) {
      const int last_seen = last_row + kv_tokens - q_tokens;
      visible = p.kv_blocks(max(last_seen + 1, 0));
      whole = min(whole, p.whole_kv_blocks(max(diagonal + 1, 0)));
    }
  }
  /// Of what the manager published.
  template <class Tile>
  __device__ TileBlocks(const Problem& p, const Tile& tile)
      : TileBlocks(p, tile.q_tokens, tile.kv_tokens, tile.batch, tile.head, tile.q_block) {}
  __device__ int words() const { return (kv_blocks + kBitsAWord - 1) / kBitsAWord; }
  /// The selected blocks among [32 w, 32 w + 32).
  __device__ uint32_t selected(const Problem& p, int w) const {
    return p.skip.word(batch, first_bit + kBitsAWord * w) & low_bits(visible - kBitsAWord * w);
  }
  /// How many blocks are selected.
  __device__ int count_selected(const Problem& p) const { return p.skip.ones(batch, first_bit, visible); }
  /// Those that need a mask.
  __device__ uint32_t partial(const Problem& p, int w) const {
    return ~low_bits(whole - kBitsAWord * w) | (p.block_len != nullptr ? p.partial[w] : 0u);
  }
};

/// A tile to compute.
struct Item {
  int q_block, batch_head;  // batch * heads + head
};

/// The work list comes in regions, each written by one CTA of the plan: no CTA waits for another.
inline constexpr int kMostRegions = 32;  // one a lane of the warp that reads them
struct Region {
  int items;    // active tiles, from the region's base on
  int blocks;   // that these select, in all
  int longest;  // that one of them selects
};

/// What the plan leaves for the attention kernel.
struct Control {
  Region region[kMostRegions];
  int next;  // work to claim beyond the first wave
};

/// The heads of all sequences in groups, whose keys and values share the L2 cache; a region is a run of groups.
/// A sequence's last group takes all heads that are left.
struct Grouping {
  int heads_a_group, groups_a_sequence, groups, regions;

  __host__ __device__ int first_group(int region) const {
    return static_cast<int>(static_cast<uint32_t>(groups) * region / regions);  // groups fit 26 bits
  }
  /// The region's first item: no smaller than the most tiles that the groups before it can have.
  __device__ int base(const Problem& p, int region) const {
    const int group = first_group(region), b = group / groups_a_sequence;
    const int head = group % groups_a_sequence * heads_a_group;
    if (p.q_indptr == nullptr) return (b * p.heads + head) * p.q_blocks(p.q_tokens);
    const Sequence s = p.sequence(b);
    return (s.q_row / p.block_q + b) * p.heads + head * p.q_blocks(s.q_tokens);
  }
};

}  // namespace flashomni::cuda::sm90
