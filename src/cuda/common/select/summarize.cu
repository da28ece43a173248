// What symbols come to: a CTA a head counts its bits, a CTA a batch element looks which of its rows compute.
#include "src/cuda/common/bits.cuh"
#include "src/cuda/common/chain.cuh"
#include "src/cuda/common/select/problem.cuh"
#include "src/cuda/common/select/select.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kLanesARow = 8;

struct SummaryProblem {
  Bits cache, skip;
  int batch, heads, q_blocks, kv_blocks;
  uint8_t *rows, *awake;
  int64_t rows_stride;  // of a batch element, in bytes
  float *selected_shares, *active_shares;
};

/// The threads' numbers added up; thread 0 has the result.
__device__ int64_t total_of_block(int64_t value) {
  __shared__ int64_t parts[kWarps];
  value = total<32>(value);
  __syncthreads();  // who called before has read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp];
  return sum;
}

__device__ float share(int64_t count, double of) {
  return static_cast<float>(static_cast<double>(count) / of);
}

__device__ void count_head(const SummaryProblem& p, int head) {
  const int lane = threadIdx.x % kLanesARow, all_rows = p.batch * p.q_blocks;
  int64_t active = 0, selected = 0;
  for (int row = threadIdx.x / kLanesARow; row < all_rows; row += kThreads / kLanesARow) {
    const int batch = row / p.q_blocks;
    const int64_t tile = int64_t(row % p.q_blocks) * p.heads + head;
    if ((p.cache.word(batch, tile) & 1) == 0) continue;
    active += lane == 0;
    for (int j = lane * kBitsAWord; j < p.kv_blocks; j += kLanesARow * kBitsAWord)
      selected += __popc(p.skip.word(batch, tile * p.kv_blocks + j) & low_bits(p.kv_blocks - j));
  }
  active = total_of_block(active), selected = total_of_block(selected);
  if (threadIdx.x != 0) return;
  p.selected_shares[head] = share(selected, static_cast<double>(all_rows) * p.kv_blocks);
  p.active_shares[head] = share(active, all_rows);
}

/// Whether any head of a row block is active.
__device__ bool computes(const SummaryProblem& p, int batch, int row) {
  uint32_t any = 0;
  for (int head = 0; head < p.heads; head += kBitsAWord)
    any |= p.cache.word(batch, int64_t(row) * p.heads + head) & low_bits(p.heads - head);
  return any != 0;
}

__device__ void write_rows(const SummaryProblem& p, int batch) {
  const int lane = threadIdx.x % 32, bytes = (p.q_blocks + 7) / 8;
  uint8_t* rows = p.rows + batch * p.rows_stride;
  bool awake = false;
  for (int first = threadIdx.x - lane; first < p.q_blocks; first += kThreads) {
    const int row = first + lane;
    const uint32_t word = __ballot_sync(kWholeWarp, row < p.q_blocks && computes(p, batch, row));
    if (lane < 4 && first / 8 + lane < bytes) rows[first / 8 + lane] = static_cast<uint8_t>(word >> 8 * lane);
    awake |= word != 0;
  }
  awake = __syncthreads_or(awake);
  if (threadIdx.x == 0) p.awake[batch] = awake;
}

__global__ void __launch_bounds__(kThreads) summarize_kernel(const __grid_constant__ SummaryProblem p) {
  wait_for_previous();
  const int index = blockIdx.x;
  if (index < p.heads) {
    count_head(p, index);
  } else {
    write_rows(p, index - p.heads);
  }
}

}  // namespace

void summarize(const SummarizeArguments& a, const Context& context) {
  const SymbolGeometry geometry{a.q_tokens, a.kv_tokens, a.heads, a.symbols.block_q, a.symbols.block_kv};
  SummaryProblem p{};
  p.cache = bits_of(a.symbols.cache, {}), p.skip = bits_of(a.symbols.skip, {});
  p.batch = static_cast<int>(a.symbols.cache.size(0)), p.heads = static_cast<int>(a.heads);
  p.q_blocks = static_cast<int>(geometry.q_blocks()), p.kv_blocks = static_cast<int>(geometry.kv_blocks());
  p.rows = a.rows.as<uint8_t>(), p.rows_stride = a.rows.strides[0];
  p.awake = a.awake.as<uint8_t>();
  p.selected_shares = a.shares.as<float>(), p.active_shares = p.selected_shares + a.shares.strides[0];
  launch_next(summarize_kernel, "summarize_kernel", p, dim3(p.heads + p.batch), kThreads, 0,
              a.symbols.cache.device.id, static_cast<cudaStream_t>(context.stream));
}

}  // namespace flashomni::cuda
