// One cluster of CTAs. Each takes a contiguous run of groups (heads of one sequence), counts its active tiles,
// learns from the others where its part of the list begins, and writes it: longest first within a group, ties
// in order, so that the list is the same at every run.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "src/cuda/sm90/attention/plan.h"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr int kCtas = 8, kThreads = 512;
constexpr int kChunk = 1024;  // tiles sorted at a time

struct PlanParameters {
  Problem problem;
  int heads_a_group;
  Item* items;
  Control* control;
  uint32_t* partial;
};

/// Heads [first, first + count) of batch element b; its tiles are numbered head by head.
struct Group {
  int batch, first_head, tiles, q_blocks;
  __device__ Group(const PlanParameters& p, int index) {
    const int groups = (p.problem.heads + p.heads_a_group - 1) / p.heads_a_group;
    batch = index / groups, first_head = index % groups * p.heads_a_group;
    const int heads = min(p.heads_a_group, p.problem.heads - first_head);
    q_blocks = (p.problem.sequence(batch).q_tokens + p.problem.block_q - 1) / p.problem.block_q;
    tiles = heads * q_blocks;
  }
  __device__ int head(int tile) const { return first_head + tile / q_blocks; }
  __device__ int q_block(int tile) const { return tile % q_blocks; }
  __device__ bool active(const PlanParameters& p, int tile) const {
    return p.problem.cache.word(batch, int64_t(q_block(tile)) * p.problem.heads + head(tile)) & 1;
  }
  __device__ int selected(const PlanParameters& p, int tile) const {
    const TileBlocks blocks(p.problem, p.problem.sequence(batch), batch, head(tile), q_block(tile));
    int count = 0;
    for (int w = 0; w < blocks.words(); ++w) count += __popc(blocks.selected(p.problem, w));
    return count;
  }
};

/// Bit j: block j holds fewer tokens than slots.
__device__ void write_partial(const PlanParameters& p) {
  const Problem& problem = p.problem;
  const int blocks = (problem.kv_tokens + problem.block_kv - 1) / problem.block_kv;
  for (int w = threadIdx.x; w * kBitsAWord < blocks; w += kThreads) {
    uint32_t word = 0;
    for (int bit = 0; bit < kBitsAWord && w * kBitsAWord + bit < blocks; ++bit)
      word |= uint32_t(problem.block_len[w * kBitsAWord + bit] < problem.block_kv) << bit;
    p.partial[w] = word;
  }
}

/// Tiles [begin, begin + tiles) of a group: the active ones into `items`, longest first. Returns their number.
__device__ int write_chunk(const PlanParameters& p, const Group& group, int begin, int tiles, Item* items) {
  __shared__ int key[kChunk];  // selected blocks; -1: cached
  int total = 0;
  for (int t = threadIdx.x; t < kChunk; t += kThreads) {
    key[t] = t < tiles && group.active(p, begin + t) ? group.selected(p, begin + t) : -1;
    total += __syncthreads_count(key[t] >= 0);
  }
  bool equal = true;  // the usual case: equal counts, and none cached
  for (int t = threadIdx.x; t < tiles; t += kThreads) equal &= key[t] == key[0] && key[t] >= 0;
  const bool in_order = __syncthreads_and(equal);
  for (int t = threadIdx.x; t < tiles; t += kThreads) {
    const int mine = key[t];
    if (mine < 0) continue;
    int place = t;
    if (!in_order) {
      place = 0;
      for (int other = 0; other < tiles; ++other) place += key[other] > mine || (key[other] == mine && other < t);
    }
    items[place] = {group.q_block(begin + t), group.batch * p.problem.heads + group.head(begin + t)};
  }
  __syncthreads();
  return total;
}

__global__ void __cluster_dims__(kCtas) __launch_bounds__(kThreads) plan_kernel(const PlanParameters p) {
  namespace cg = cooperative_groups;
  __shared__ int active_here;
  const auto cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), thread = threadIdx.x;
  const int groups =
      p.problem.batch * ((p.problem.heads + p.heads_a_group - 1) / p.heads_a_group);
  const int first = int64_t(groups) * rank / kCtas, last = int64_t(groups) * (rank + 1) / kCtas;

  if (thread == 0) active_here = 0;
  __syncthreads();
  int active = 0;
  for (int g = first; g < last; ++g) {
    const Group group(p, g);
    for (int t = thread; t < group.tiles; t += kThreads) active += group.active(p, t);
  }
  active = __reduce_add_sync(~0u, active);
  if (thread % 32 == 0 && active > 0) atomicAdd(&active_here, active);
  if (rank == kCtas - 1 && p.partial != nullptr) write_partial(p);
  cluster.sync();
  int offset = 0;
  for (int r = 0; r < rank; ++r) offset += *cluster.map_shared_rank(&active_here, r);
  if (rank == kCtas - 1 && thread == 0) *p.control = {offset + active_here, 0};

  for (int g = first; g < last; ++g) {
    const Group group(p, g);
    for (int begin = 0; begin < group.tiles; begin += kChunk)
      offset += write_chunk(p, group, begin, min(kChunk, group.tiles - begin), p.items + offset);
  }
  cluster.sync();  // no CTA leaves while another may still read its count
}

}  // namespace

int64_t most_tiles(const Problem& problem) {
  const int64_t blocks = (problem.q_tokens + problem.block_q - 1) / problem.block_q;
  // A ragged batch: each sequence but one may add a block that it does not fill.
  return problem.heads * (problem.q_indptr == nullptr ? blocks * problem.batch : blocks + problem.batch);
}

void launch_plan(const Problem& problem, int heads_a_group, Item* items, Control* control, uint32_t* partial,
                 cudaStream_t stream) {
  plan_kernel<<<kCtas, kThreads, 0, stream>>>({problem, heads_a_group, items, control, partial});
  check_cuda(cudaGetLastError(), "plan_kernel");
}

}  // namespace flashomni::cuda::sm90
