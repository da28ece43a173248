// GEMM-Q's plan. A list a (batch element, head): its active row blocks in order, 256 tokens a tile. Each CTA
// counts every list, so that it knows its own list's place without waiting for the others, and writes that list.
//
// The order of tiles: bands of a few tiles of every list, so that the heads that read the same tokens run
// together; then the lists' ends that fill at most half a tile, as their tiles are short and even out the tail.
#include "src/cuda/sm90/gemm/plan.h"

#include <algorithm>

#include "flashomni/error.h"
#include "src/cuda/ptx/control.cuh"
#include "src/cuda/sm90/gemm/gemm_q.cuh"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBand = 8;            // wide tiles of a list: 2048 tokens
constexpr int kMostLists = 4096;    // whose counts shared memory holds
constexpr int kMostRowBlocks = 48 * 1024;  // which shared memory holds, too
constexpr int kMostSharers = 8;     // CTAs that write one list, of which each takes some of its groups

/// What a list of active row blocks becomes.
struct ListTiles {
  int wide, narrow;
  __device__ ListTiles(int active, int block_q) {
    const int full = 256 / block_q, rest = active % full;
    wide = active / full + (rest * block_q > 128);
    narrow = rest > 0 && rest * block_q <= 128;
  }
};

/// Active row blocks of every list.
__device__ void count_lists(const QProblem& p, int* counts) {
  const int lists = p.batch * p.heads;
  for (int i = threadIdx.x; i < lists; i += kThreads) counts[i] = 0;
  __syncthreads();
  const int64_t first = int64_t(p.first_block) * p.heads, bits = int64_t(p.blocks) * p.heads;
  const int words = static_cast<int>((bits + kBitsAWord - 1) / kBitsAWord);
  for (int i = threadIdx.x; i < words * p.batch; i += kThreads) {
    const int b = i / words;
    const int64_t at = int64_t(i % words) * kBitsAWord;
    uint32_t word = p.cache.word(b, first + at) & low_bits(static_cast<int>(min(bits - at, int64_t(kBitsAWord))));
    if (p.heads == 1) {
      atomicAdd(&counts[b], __popc(word));
      continue;
    }
    for (const int head = static_cast<int>(at % p.heads); word != 0; word &= word - 1)
      atomicAdd(&counts[b * p.heads + (head + __ffs(word) - 1) % p.heads], 1);
  }
  __syncthreads();
}

/// The active row blocks of one list, in order, into `active`.
__device__ void compact(const QProblem& p, int batch, int head, int* active) {
  __shared__ int before[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int base = 0;
  for (int begin = 0; begin < p.blocks; begin += kThreads) {
    const int block = begin + threadIdx.x;
    const bool mine =
        block < p.blocks && (p.cache.word(batch, int64_t(p.first_block + block) * p.heads + head) & 1);
    const uint32_t ballot = __ballot_sync(ptx_ops::kWholeWarp, mine);
    if (lane == 0) before[warp] = __popc(ballot);
    __syncthreads();
    int place = base + __popc(ballot & low_bits(lane));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += before[w];
      base += before[w];
    }
    if (mine) active[place] = block;
    __syncthreads();
  }
}

struct Sums {
  int wide, narrow, wide_before, narrow_before;
};
/// Tiles of all lists and of those before `list`, a warp's lanes together; of each list, only wide tiles
/// [first, first + most) count.
__device__ Sums sum_lists(const QProblem& p, const int* counts, int list, int first, int most) {
  Sums s{};
  for (int i = threadIdx.x % 32; i < p.batch * p.heads; i += 32) {
    const ListTiles tiles(counts[i], p.block_q);
    const int wide = min(max(tiles.wide - first, 0), most);
    s.wide += wide, s.narrow += tiles.narrow;
    if (i < list) s.wide_before += wide, s.narrow_before += tiles.narrow;
  }
  return {__reduce_add_sync(ptx_ops::kWholeWarp, s.wide), __reduce_add_sync(ptx_ops::kWholeWarp, s.narrow),
          __reduce_add_sync(ptx_ops::kWholeWarp, s.wide_before),
          __reduce_add_sync(ptx_ops::kWholeWarp, s.narrow_before)};
}

__device__ QItem item_of(const QProblem& p, const int* active, int count, int tile, int list, int group) {
  QItem item;
  const int full = 256 / p.block_q;
#pragma unroll
  for (int i = 0; i < kMostBlocks; ++i) {
    const int at = tile * full + i;
    item.row[i] =
        i < full && at < count ? (p.first_block + active[at]) * p.block_q - p.row_offset : kNoRow;
  }
  item.batch_head = list, item.group = group;
  return item;
}

/// How many tiles are split, and over how many CTAs: those left over from whole rounds, if that pays.
__device__ void write_control(const QPlanArguments& a, int wide, int narrow) {
  const int ctas = a.problem.ctas, steps = a.problem.steps;
  const int64_t halves = 2 * int64_t(wide) + narrow, rounds = halves / (2 * ctas);
  const int rest = static_cast<int>((halves - rounds * 2 * ctas + 1) / 2);
  int split = rounds == 0 ? wide + narrow : min(wide, rest);
  if (split > most_split_tiles(ctas, steps)) split = 0;
  const int split_ctas = min(ctas, split * min(kMostPartsATile, steps));
  *a.control = {wide, narrow, split, split_ctas, 0};
}

__global__ void __launch_bounds__(kThreads, 1) q_plan_kernel(const __grid_constant__ QPlanArguments a) {
  cudaTriggerProgrammaticLaunchCompletion();  // the next kernel may be set up; it waits for this one's end
  __shared__ int counts[kMostLists];
  extern __shared__ int active[];
  const QProblem& p = a.problem;
  const int list = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  count_lists(p, counts);
  compact(p, list / p.heads, list % p.heads, active);
  const int count = counts[list];
  const ListTiles mine(count, p.block_q);
  const Sums all = sum_lists(p, counts, list, 0, INT_MAX);
  const int wide = all.wide * p.groups, narrow = all.narrow * p.groups;

  for (int band = warp; band * kBand < mine.wide; band += kWarps) {
    const int first = band * kBand, tiles = min(mine.wide - first, kBand);
    const int before = sum_lists(p, counts, list, 0, first).wide * p.groups +
                       sum_lists(p, counts, list, first, kBand).wide_before * p.groups;
    for (int group = blockIdx.y; group < p.groups; group += gridDim.y)
      if (lane < tiles)
        a.items[before + group * tiles + lane] = item_of(p, active, count, first + lane, list, group);
  }
  if (mine.narrow)
    for (int group = blockIdx.y + gridDim.y * threadIdx.x; group < p.groups; group += gridDim.y * kThreads)
      a.items[wide + all.narrow_before * p.groups + group] =
          item_of(p, active, count, mine.wide, list, group);
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < a.arrival_count; i += kThreads) a.arrivals[i] = 0;
    if (threadIdx.x == 0) write_control(a, wide, narrow);
  }
}

__global__ void o_plan_kernel(int* counter) {
  cudaTriggerProgrammaticLaunchCompletion();
  *counter = 0;
}

}  // namespace

int64_t most_items(const QProblem& p) {
  return int64_t(p.batch) * p.heads * p.groups * (p.blocks / (256 / p.block_q) + 1);
}

void check_plan_serves(const QProblem& p) {
  if (int64_t(p.batch) * p.heads > kMostLists)
    throw Error(ErrorKind::kNotImplemented, text("x: expected batch * heads up to ", kMostLists, " (cuda_sm90), got ",
                                                 int64_t(p.batch) * p.heads));
  if (p.blocks > kMostRowBlocks)
    throw Error(ErrorKind::kNotImplemented,
                text("x: expected up to ", kMostRowBlocks, " row blocks (cuda_sm90), got ", p.blocks));
  if (most_items(p) > INT_MAX / 4)
    throw Error(ErrorKind::kNotImplemented,
                text("out: expected fewer than 2^29 tiles (cuda_sm90), got ", most_items(p)));
}

void launch_q_plan(const QPlanArguments& a, cudaStream_t stream) {
  static PerDevice configured;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  configured.once(device, [] {
    check_cuda(cudaFuncSetAttribute(q_plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostRowBlocks * 4),
               "q_plan_kernel's shared memory");
  });
  const dim3 grid(a.problem.batch * a.problem.heads, std::min(a.problem.groups, kMostSharers));
  q_plan_kernel<<<grid, kThreads, a.problem.blocks * 4, stream>>>(a);
  check_cuda(cudaGetLastError(), "q_plan_kernel");
}

void launch_o_plan(int* counter, cudaStream_t stream) {
  o_plan_kernel<<<1, 1, 0, stream>>>(counter);
  check_cuda(cudaGetLastError(), "o_plan_kernel");
}

}  // namespace flashomni::cuda::sm90
