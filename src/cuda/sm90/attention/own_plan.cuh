// The plan of a problem of few tiles, which every CTA makes for itself, all the same one: no kernel before this one,
// and no list to fetch where the tiles come in order.
#pragma once

#include <climits>

#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/mbarrier.cuh"
#include "src/cuda/sm90/attention/problem.cuh"

namespace flashomni::cuda::sm90 {

inline constexpr int kMostOwnTiles = 1024, kMostOwnGroups = 4;
inline constexpr int kMostOwnWords = 8 * 1024;  // of the skip symbols, which every CTA reads

/// What stays of it, in shared memory. Starts as {0, 0, -1, INT_MAX}.
struct OwnPlan {
  int tiles, blocks;      // active tiles, and blocks that they select in all
  int longest, shortest;  // that one tile selects; -1 where it is cached
  /// Whether all tiles are active and as long, so that the list is 0, 1, 2 ...
  __device__ bool in_order() const { return longest == shortest; }
};

/// Makes the plan, by all kThreads threads of a CTA: count(), then order().
template <int kThreads>
struct OwnPlanner {
  static constexpr int kWarps = kThreads / 32, kChunks = kMostOwnTiles / 32, kKeys = kMostOwnGroups * kBuckets;
  static constexpr int kTilesAThread = (kMostOwnTiles + kThreads - 1) / kThreads;
  /// Of shared memory, that nobody uses yet.
  struct alignas(16) Scratch {
    union {
      uint32_t words[kMostOwnWords];      // first: the skip symbols
      uint16_t before[kChunks][kKeys];    // then: of each key, tiles in this chunk, then those in chunks before it
    };
    int first[kKeys];              // where the tiles of a key begin in the list
    int16_t selects[kMostOwnTiles];  // -1: cached
  };

  const Problem& problem;
  const Grouping& grouping;
  OwnPlan& plan;
  Scratch& scratch;
  uint16_t* list;  // active tiles, by group, the longest first
  const int thread = ptx_ops::thread_index();
  const int q_blocks = problem.q_blocks(), tiles = problem.batch * problem.heads * q_blocks;

  /// What every tile selects.
  __device__ void count() const {
    uint32_t active = 0;  // a bit a tile of this thread
#pragma unroll
    for (int i = 0; i < kTilesAThread; ++i) {
      const int t = thread + i * kThreads, head = t / q_blocks;
      if (t < tiles) active |= (cache_word(head, t - head * q_blocks) & 1) << i;
    }
    const int words = words_an_element();
    for (int b = 0; b < problem.batch; ++b)
      for (int w = thread; w < words; w += kThreads)
        scratch.words[b * words + w] = problem.skip.word(b, int64_t(kBitsAWord) * w);
    __syncthreads();
    int sum = 0, longest = -1, shortest = INT_MAX;
    for (int t = thread; t < tiles; t += kThreads, active >>= 1) {
      const int selects = active & 1 ? selected(t) : -1;
      scratch.selects[t] = static_cast<int16_t>(selects);
      sum += selects + 1, longest = max(longest, selects), shortest = min(shortest, selects);
    }
    tell(sum, longest, shortest);
  }
  /// Then their order.
  __device__ void order() const {
    give_back_scratch();
    if (plan.in_order()) return;
    auto* zeros = reinterpret_cast<uint4*>(scratch.before);
    for (int i = thread; i < int(sizeof(scratch.before) / sizeof(uint4)); i += kThreads) zeros[i] = {};
    __syncthreads();
    each_tile([&](int, int key, int rank, int same, uint16_t* before) {
      if (rank == 0) before[key] = same;
    });
    __syncthreads();
    for (int key = thread; key < kKeys; key += kThreads) add_up_chunks(key);
    __syncthreads();
    if (thread < 32) add_up_keys();
    __syncthreads();
    each_tile([&](int t, int key, int rank, int, uint16_t* before) {
      list[scratch.first[key] + before[key] + rank] = t;
    });
    give_back_scratch();
  }

 private:
  /// For the copy engine to write there.
  __device__ static void give_back_scratch() {
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncthreads();
  }
  /// With one more, that is read with the last.
  __device__ int words_an_element() const {
    return problem.heads * q_blocks * problem.kv_blocks() / kBitsAWord + 2;
  }
  __device__ uint32_t cache_word(int batch_head, int q_block) const {
    const int batch = batch_head / problem.heads, head = batch_head - batch * problem.heads;
    return problem.cache.word(batch, int64_t(q_block) * problem.heads + head);
  }
  __device__ int selected(int t) const {
    const int batch_head = t / q_blocks, batch = batch_head / problem.heads, head = batch_head - batch * problem.heads;
    const TileBlocks of(problem, problem.q_tokens, problem.kv_tokens, batch, head, t - batch_head * q_blocks);
    const int first = static_cast<int>(of.first_bit);
    const uint32_t* words = scratch.words + batch * words_an_element() + first / kBitsAWord;
    int count = 0;
#pragma unroll 1
    for (int left = of.visible; left > 0; left -= kBitsAWord, ++words)
      count += __popc(__funnelshift_r(words[0], words[1], first) & low_bits(left));
    return count;
  }
  /// The CTA, of this thread's tiles. `sum`: blocks, and one for every tile that is active.
  __device__ void tell(int sum, int longest, int shortest) const {
    int active = 0;
    for (int t = thread; t < tiles; t += kThreads) active += scratch.selects[t] >= 0;
    active = __reduce_add_sync(ptx_ops::kWholeWarp, active);
    sum = __reduce_add_sync(ptx_ops::kWholeWarp, sum);
    longest = __reduce_max_sync(ptx_ops::kWholeWarp, longest);
    shortest = __reduce_min_sync(ptx_ops::kWholeWarp, shortest);
    if (thread % 32 != 0) return;
    atomicAdd(&plan.tiles, active), atomicAdd(&plan.blocks, sum - active);
    atomicMax(&plan.longest, longest), atomicMin(&plan.shortest, shortest);
  }

  // A counting sort by keys, (group, bucket), in which tiles of one key stay in order. Chunks are 32 tiles, a warp's.
  /// Calls use(t, key, rank, same, before) for every active tile: which of how many of its key it is in its chunk.
  template <class Use>
  __device__ void each_tile(Use use) const {
#pragma unroll 1
    for (int t = thread; t / 32 * 32 < tiles; t += kThreads) {
      const int selects = t < tiles ? scratch.selects[t] : -1;
      const int key = selects < 0 ? -1 : group_of(t) * kBuckets + bucket_of(selects, problem.kv_blocks());
      const uint32_t same = __match_any_sync(ptx_ops::kWholeWarp, key);
      if (key >= 0) use(t, key, __popc(same & low_bits(thread % 32)), __popc(same), scratch.before[t / 32]);
    }
  }
  __device__ int group_of(int t) const {
    const int batch_head = t / q_blocks, batch = batch_head / problem.heads, head = batch_head - batch * problem.heads;
    const int last = grouping.groups_a_sequence - 1;
    return batch * grouping.groups_a_sequence + min(head / grouping.heads_a_group, last);
  }
  __device__ void add_up_chunks(int key) const {
    int sum = 0;
#pragma unroll 8
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int own = scratch.before[chunk][key];
      scratch.before[chunk][key] = static_cast<uint16_t>(sum);
      sum += own;
    }
    scratch.first[key] = sum;
  }
  /// By one warp: sums become those of the keys before.
  __device__ void add_up_keys() const {
    int before = 0;
    for (int key = thread; key < kKeys; key += 32) {
      const int own = scratch.first[key];
      int until = own;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(ptx_ops::kWholeWarp, until, distance);
        if (thread >= distance) until += below;
      }
      scratch.first[key] = before + until - own;
      before += __shfl_sync(ptx_ops::kWholeWarp, until, 31);
    }
  }
};

}  // namespace flashomni::cuda::sm90
