// A CTA a region of the work list. It looks at its groups of heads one after the other, counts what each tile
// selects, and appends the active ones: longest first within a group, ties in order, so that the list is the
// same at every run.
#include "src/cuda/sm90/attention/plan.h"

#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "src/cuda/common/chain.cuh"
#include "src/cuda/ptx/control.cuh"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kChunk = kThreads;  // tiles sorted at a time: one a thread
constexpr int kBuckets = 128;     // by length, the last one for tiles that are cached

/// Keys and values that half of the L2 cache holds.
constexpr int64_t kSharedCacheBytes = 25 << 20;

/// Some heads of one sequence; its tiles are numbered head by head.
struct Group {
  const Problem& problem;
  int batch, first_head, tiles, q_blocks;
  Sequence sequence;

  __device__ Group(const Problem& problem, const Grouping& grouping, int index)
      : problem(problem),
        batch(index / grouping.groups_a_sequence),
        first_head(index % grouping.groups_a_sequence * grouping.heads_a_group),
        sequence(problem.sequence(batch)) {
    q_blocks = problem.q_blocks(sequence.q_tokens);
    const bool last = index % grouping.groups_a_sequence == grouping.groups_a_sequence - 1;
    tiles = (last ? problem.heads - first_head : grouping.heads_a_group) * q_blocks;
  }
  /// Blocks that a tile selects; -1 where it is cached.
  __device__ int selected(int tile) const {
    const int head = first_head + tile / q_blocks, q_block = tile % q_blocks;
    if (!(problem.cache.word(batch, int64_t(q_block) * problem.heads + head) & 1)) return -1;
    return TileBlocks(problem, sequence.q_tokens, sequence.kv_tokens, batch, head, q_block).count_selected(problem);
  }
  __device__ int kv_blocks() const { return problem.kv_blocks(sequence.kv_tokens); }
  __device__ Item item(int tile) const {
    return {tile % q_blocks, batch * problem.heads + first_head + tile / q_blocks};
  }
};

/// Bit j: block j holds fewer tokens than slots.
__device__ void write_partial(const Problem& problem, uint32_t* partial) {
  const int blocks = problem.kv_blocks(problem.kv_tokens);
  for (int w = threadIdx.x; w * kBitsAWord < blocks; w += kThreads) {
    uint32_t word = 0;
    for (int bit = 0; bit < kBitsAWord && w * kBitsAWord + bit < blocks; ++bit)
      word |= uint32_t(problem.block_len[w * kBitsAWord + bit] < problem.block_kv) << bit;
    partial[w] = word;
  }
}

/// How many of the CTA's threads come before this one in the order of (bucket, thread). A counting sort.
__device__ int place_of(int bucket) {
  using Scan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  constexpr int kCounts = kBuckets * kWarps, kCountsAThread = kCounts / kThreads;
  __shared__ int before[kCounts];  // by bucket, then by warp: counts, then those of all before
  __shared__ typename Scan::TempStorage scan;
  const int warp = threadIdx.x / 32, first = threadIdx.x * kCountsAThread;
  int counts[kCountsAThread] = {};
#pragma unroll
  for (int i = 0; i < kCountsAThread; ++i) before[first + i] = 0;
  __syncthreads();
  const unsigned same = __match_any_sync(ptx_ops::kWholeWarp, bucket);
  const int rank = __popc(same & low_bits(threadIdx.x % 32));
  if (rank == 0) before[bucket * kWarps + warp] = __popc(same);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCountsAThread; ++i) counts[i] = before[first + i];
  Scan(scan).ExclusiveSum(counts, counts);
#pragma unroll
  for (int i = 0; i < kCountsAThread; ++i) before[first + i] = counts[i];
  __syncthreads();
  return before[bucket * kWarps + warp] + rank;
}

/// Tiles [begin, begin + tiles) of a group: the active ones into `items`, longest first. Returns their number;
/// adds what this thread's tiles select to `blocks`, and raises `longest` to the most that one selects.
__device__ int write_chunk(const Group& group, int begin, int tiles, Item* items, int& blocks, int& longest) {
  __shared__ int first;  // what the first tile selects
  const int t = threadIdx.x, selects = t < tiles ? group.selected(begin + t) : -1;
  if (t == 0) first = selects;
  blocks += max(selects, 0);
  longest = max(longest, selects);
  const int total = __syncthreads_count(selects >= 0);
  if (total == 0) return 0;
  // The usual case: equal counts, and none cached.
  const bool in_order = __syncthreads_and(t >= tiles || (selects >= 0 && selects == first));
  // Lengths within a bucket's width of each other count as equal.
  const int most = group.kv_blocks(), bucket = (most - max(selects, 0)) * (kBuckets - 2) / max(most, 1);
  const int place = in_order ? t : place_of(selects < 0 ? kBuckets - 1 : bucket);
  if (selects >= 0) items[place] = group.item(begin + t);
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kThreads, 1) plan_kernel(const __grid_constant__ PlanArguments p) {
  let_next_start();
  wait_for_previous();
  __shared__ int all_blocks, longest_of_all;
  if (threadIdx.x == 0) all_blocks = longest_of_all = 0;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.arrival_count; i += kThreads) p.arrivals[i] = 0;
    if (threadIdx.x == 0) p.control->next = 0;
  }
  if (blockIdx.x == gridDim.x - 1 && p.partial != nullptr) write_partial(p.problem, p.partial);

  Item* items = p.items + p.grouping.base(p.problem, blockIdx.x);
  int count = 0, blocks = 0, longest = 0;
  const int last = p.grouping.first_group(blockIdx.x + 1);
  for (int g = p.grouping.first_group(blockIdx.x); g < last; ++g) {
    const Group group(p.problem, p.grouping, g);
    for (int begin = 0; begin < group.tiles; begin += kChunk)
      count += write_chunk(group, begin, min(kChunk, group.tiles - begin), items + count, blocks, longest);
  }
  blocks = __reduce_add_sync(~0u, blocks);
  longest = __reduce_max_sync(~0u, longest);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&all_blocks, blocks);
    atomicMax(&longest_of_all, longest);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.control->region[blockIdx.x] = {count, all_blocks, longest_of_all};
}

}  // namespace

Grouping grouping_of(const Problem& problem, int64_t bytes_a_head) {
  Grouping g;
  const int64_t fit = kSharedCacheBytes / std::max<int64_t>(bytes_a_head, 1);
  g.heads_a_group = static_cast<int>(std::clamp<int64_t>(fit, 1, problem.heads));
  g.groups_a_sequence = (problem.heads + g.heads_a_group - 1) / g.heads_a_group;
  // The tail evens out where the last tiles are those of several heads, sorted as one.
  const int64_t q_blocks = (problem.q_tokens + problem.block_q - 1) / problem.block_q;
  for (int merged = 2; merged > 0; --merged)
    if (g.groups_a_sequence > merged + 1 && (merged + 1) * g.heads_a_group * q_blocks <= kChunk) {
      g.groups_a_sequence -= merged;
      break;
    }
  g.groups = g.groups_a_sequence * problem.batch;
  g.regions = std::min(g.groups, kMostRegions);
  return g;
}

int64_t most_tiles(const Problem& problem) {
  const int64_t blocks = (problem.q_tokens + problem.block_q - 1) / problem.block_q;
  // A ragged batch: each sequence may add a block that it does not fill.
  return problem.heads * (problem.q_indptr == nullptr ? blocks * problem.batch : blocks + problem.batch);
}

void launch_plan(const PlanArguments& arguments, cudaStream_t stream) {
  static PerDevice configured;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  // As the kernel after it: to divide the SMs' memory anew costs microseconds.
  configured.once(device, [] {
    check_cuda(cudaFuncSetAttribute(plan_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "plan_kernel's shared memory");
  });
  launch_next(plan_kernel, "plan_kernel", arguments, dim3(arguments.grouping.regions), kThreads, 0, device, stream);
}

}  // namespace flashomni::cuda::sm90
