// GEMM-Q's plan. A list a (batch element, head): its active row blocks in order, 256 tokens an item of two
// tiles that share the tokens, 512 where they share the weight. Each CTA counts every list, so that it knows
// its own list's place without waiting for the others, and writes that list.
//
// The order of tiles: bands of row blocks, of each band the tiles of all lists that begin in it, so that what
// runs at one time reads the same tokens whatever the pattern; then tiles of half the width, which are short
// and even out the tail: the lists' ends, and the last wide tiles halved where they would leave SMs idle.
#include "src/cuda/sm90/gemm/plan.h"

#include <algorithm>

#include "flashomni/error.h"
#include "src/cuda/common/chain.cuh"
#include "src/cuda/ptx/control.cuh"
#include "src/cuda/sm90/gemm/gemm_q.cuh"
#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBandTokens = 2048;
constexpr int kMostLists = 4096;
constexpr int kMostCounts = 2 * kMostLists;  // a band and list: what shared memory holds
constexpr int kMostRowBlocks = 40 * 1024;    // which shared memory holds, too
// Counts of all bands and of the border past the last one.
constexpr int kMostShared = (kMostCounts + kMostLists + kMostRowBlocks) * 4;
constexpr int kPiece = 4;        // bits that a thread counts at a time: 4,608 tokens of 24 heads keep all busy
constexpr int kMostWriters = 8;  // CTAs that write one list, of which each takes some of its groups

/// What a list of active row blocks becomes.
struct ListTiles {
  int wide, narrow;
  __device__ ListTiles(int active, int full) {
    const int rest = active % full;
    wide = active / full + (2 * rest > full);
    narrow = rest > 0 && 2 * rest <= full;
  }
};

/// Row blocks a band, and bands.
struct Bands {
  int blocks, count;
  __host__ __device__ explicit Bands(const QProblem& p) {
    const int most = max(kMostCounts / (p.batch * p.heads) - 1, 1);
    blocks = max(kBandTokens / p.block_q, (p.blocks + most - 1) / most);
    count = (p.blocks + blocks - 1) / blocks;
  }
  __host__ __device__ int counts(const QProblem& p) const { return (count + 1) * p.batch * p.heads; }

 private:
  __host__ __device__ static int max(int a, int b) { return a > b ? a : b; }
};

/// before[b * lists + i]: active row blocks of list i that come before band b, for b up to the number of
/// bands.
__device__ void count_lists(const QProblem& p, const Bands& bands, int* before) {
  const int lists = p.batch * p.heads;
  for (int i = threadIdx.x; i < (bands.count + 1) * lists; i += kThreads) before[i] = 0;
  __syncthreads();
  const int64_t first = int64_t(p.first_block) * p.heads;
  const int bits = p.blocks * p.heads, pieces = (bits + kPiece - 1) / kPiece;
  for (int i = threadIdx.x; i < pieces * p.batch; i += kThreads) {
    const int b = i / pieces, at = (i - b * pieces) * kPiece;
    const uint32_t word = p.cache.word(b, first + at) & low_bits(min(bits - at, kPiece));
    int block = at / p.heads, head = at - block * p.heads;
#pragma unroll
    for (int bit = 0; bit < kPiece; ++bit) {
      if (word >> bit & 1) atomicAdd(&before[(block / bands.blocks + 1) * lists + b * p.heads + head], 1);
      if (++head == p.heads) head = 0, ++block;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < lists; i += kThreads)
    for (int b = 1; b <= bands.count; ++b) before[b * lists + i] += before[(b - 1) * lists + i];
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

/// Wide tiles of a list that begin before its `active`-th active row block.
__device__ int wide_before(const ListTiles& list, int active, int full) {
  return min((active + full - 1) / full, list.wide);
}

/// Wide tiles that come before those of `list` in band `band`: a warp's lanes together.
__device__ int place_of(const QProblem& p, const Bands& bands, const int* before, int list, int band) {
  const int lists = p.batch * p.heads;
  int place = 0;
  for (int i = threadIdx.x % 32; i < lists; i += 32) {
    const ListTiles tiles(before[bands.count * lists + i], p.item_blocks);
    place += wide_before(tiles, before[(i < list ? band + 1 : band) * lists + i], p.item_blocks);
  }
  return __reduce_add_sync(ptx_ops::kWholeWarp, place);
}

struct Sums {
  int wide, narrow, narrow_before;
};
/// Tiles of all lists, and of those before `list`: a warp's lanes together.
__device__ Sums sum_lists(const QProblem& p, const int* counts, int list) {
  Sums s{};
  for (int i = threadIdx.x % 32; i < p.batch * p.heads; i += 32) {
    const ListTiles tiles(counts[i], p.item_blocks);
    s.wide += tiles.wide, s.narrow += tiles.narrow;
    if (i < list) s.narrow_before += tiles.narrow;
  }
  return {__reduce_add_sync(ptx_ops::kWholeWarp, s.wide), __reduce_add_sync(ptx_ops::kWholeWarp, s.narrow),
          __reduce_add_sync(ptx_ops::kWholeWarp, s.narrow_before)};
}

/// The active row blocks [first, last) of a list, all for both tiles or a half for each.
__device__ QItem item_of(const QProblem& p, const int* active, int first, int last, int list, int group) {
  const int middle = p.shares_tokens ? last : first + (last - first + 1) / 2;
  QItem item;
#pragma unroll
  for (int i = 0; i < kMostSharers * kMostBlocks; ++i) {
    const bool second = i >= kMostBlocks;
    const int at = (second ? middle : first) + i % kMostBlocks;
    item.row[second][i % kMostBlocks] =
        at < (second ? last : middle) ? (p.first_block + active[at]) * p.block_q - p.row_offset : kNoRow;
  }
  item.batch_head = list, item.group = group;
  return item;
}

/// Wide tiles to halve: those left over from whole rounds (all clusters busy), where their halves fit one
/// round of half the length.
__device__ int halved_tiles(int wide, int narrow, int clusters) {
  const int rest = wide % clusters;
  return 2 * rest + narrow <= clusters ? rest : 0;
}

__global__ void __launch_bounds__(kThreads, 1) q_plan_kernel(const __grid_constant__ QPlanArguments a) {
  let_next_start();
  wait_for_previous();
  extern __shared__ int dynamic[];
  const QProblem& p = a.problem;
  const Bands bands(p);
  int *before = dynamic, *active = dynamic + bands.counts(p);
  const int list = blockIdx.x, lists = p.batch * p.heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  count_lists(p, bands, before);
  compact(p, list / p.heads, list % p.heads, active);
  const int* counts = before + bands.count * lists;
  const int count = counts[list];
  const int full = p.item_blocks;
  const ListTiles mine(count, full);
  const Sums all = sum_lists(p, counts, list);
  const int wide = all.wide * p.groups, narrow = all.narrow * p.groups;
  const int halved = halved_tiles(wide, narrow, p.clusters), kept = wide - halved;

  for (int band = warp; band < bands.count; band += kWarps) {
    const int first = wide_before(mine, before[band * lists + list], full);
    const int tiles = wide_before(mine, before[(band + 1) * lists + list], full) - first;
    const int place = place_of(p, bands, before, list, band) * p.groups;
    for (int group = blockIdx.y; group < p.groups; group += gridDim.y)
      for (int i = lane; i < tiles; i += 32) {
        const int at = place + group * tiles + i, block = (first + i) * full, past = at - kept;
        const int last = min(block + full, count), middle = block + full / 2;
        if (past < 0) {
          a.items[at] = item_of(p, active, block, last, list, group);
        } else {
          a.items[kept + 2 * past] = item_of(p, active, block, middle, list, group);
          a.items[kept + 2 * past + 1] = item_of(p, active, middle, last, list, group);
        }
      }
  }
  if (mine.narrow)
    for (int group = blockIdx.y + gridDim.y * threadIdx.x; group < p.groups; group += gridDim.y * kThreads)
      a.items[kept + 2 * halved + all.narrow_before * p.groups + group] =
          item_of(p, active, mine.wide * full, count, list, group);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.control = {kept + 2 * halved + narrow, 0};
}

__global__ void o_plan_kernel(int* counter) {
  let_next_start();
  wait_for_previous();
  *counter = 0;
}

}  // namespace

int64_t most_items(const QProblem& p) {
  return int64_t(p.batch) * p.heads * p.groups * (p.blocks / p.item_blocks + 1) + p.clusters / 2;
}

void check_plan_serves(const QProblem& p) {
  if (int64_t(p.batch) * p.heads > kMostLists)
    throw Error(ErrorKind::kNotImplemented, text("x: expected batch * heads up to ", kMostLists,
                                                 " (cuda_sm90), got ", int64_t(p.batch) * p.heads));
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
    check_cuda(cudaFuncSetAttribute(q_plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared),
               "q_plan_kernel's shared memory");
    // As the kernel after it: to divide the SMs' memory anew costs microseconds.
    check_cuda(cudaFuncSetAttribute(q_plan_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "q_plan_kernel's shared memory");
  });
  const dim3 grid(a.problem.batch * a.problem.heads, std::min(a.problem.groups, kMostWriters));
  const int bytes = (Bands(a.problem).counts(a.problem) + a.problem.blocks) * 4;
  launch_next(q_plan_kernel, "q_plan_kernel", a, grid, kThreads, bytes, device, stream);
}

void launch_o_plan(int* counter, int device, cudaStream_t stream) {
  launch_next(o_plan_kernel, "o_plan_kernel", counter, dim3(1), 1, 0, device, stream);
}

}  // namespace flashomni::cuda::sm90
