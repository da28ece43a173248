// S_q, and the bits: a thread a byte of S_s or S_c.
#include "src/cuda/common/chain.cuh"
#include "src/cuda/common/select/problem.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256;

/// Eight bits of a tile's row from KV block j on: none where the tile is not active or past the row's end.
__device__ unsigned row_bits(const SelectProblem& p, int batch, int64_t tile, int j) {
  const int64_t at = batch * p.tiles() + tile;
  const uint8_t* row = p.kept + at * p.kept_bytes() + j / 8;
  const unsigned both = row[0] | row[1] << 8;
  return both >> j % 8 & (p.active[at] != 0 ? 0xff : 0);  // without a branch: no load waits for another
}

/// Byte `k` of S_s. Rows follow each other bit by bit, so that it may hold bits of several.
__device__ unsigned skip_byte(const SelectProblem& p, int batch, int64_t k) {
  const int64_t last = p.tiles() - 1;
  int64_t tile = k * 8 / p.kv_blocks;
  const int j = static_cast<int>(k * 8 - tile * p.kv_blocks);
  int filled = p.kv_blocks - j;
  // The next tile is read whether the byte reaches it or not: both are in flight together.
  unsigned byte = row_bits(p, batch, tile, j);
  byte |= row_bits(p, batch, min(tile + 1, last), 0) << (tile < last ? min(filled, 8) : 8);
  filled += p.kv_blocks;
#pragma unroll 1
  for (tile += 2; filled < 8 && tile <= last; ++tile, filled += p.kv_blocks)
    byte |= row_bits(p, batch, tile, 0) << filled;
  return byte;
}

/// Byte `k` of S_c.
__device__ unsigned cache_byte(const SelectProblem& p, int batch, int64_t k) {
  const uint8_t* active = p.active + batch * p.tiles() + k * 8;
  const int count = static_cast<int>(min(p.tiles() - k * 8, int64_t{8}));
  unsigned byte = 0;
#pragma unroll
  for (int bit = 0; bit < 8; ++bit)  // all eight are read, in flight together
    byte |= (active[min(bit, count - 1)] & unsigned{bit < count}) << bit;
  return byte;
}

// At least one CTA an SM: with fewer registers, what is on its way is spilled, which waits for it.
__global__ void __launch_bounds__(kThreads, 1) pack_kernel(const __grid_constant__ SelectProblem p) {
  wait_for_previous();
  const int batch = blockIdx.y, lane = threadIdx.x % 32;
  const int* counts = p.counts + int64_t(batch) * p.heads;
  int active = lane < p.heads ? counts[lane] : 0;  // on its way while the byte is made
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x, in_cache = k - p.skip_bytes;
  uint8_t* to = nullptr;
  unsigned byte = 0;
  if (k < p.skip_bytes) {
    to = p.skip_bits + batch * p.skip_stride + k;
    byte = skip_byte(p, batch, k);
  } else if (in_cache < p.cache_bytes) {
    to = p.cache_bits + batch * p.cache_stride + in_cache;
    byte = cache_byte(p, batch, in_cache);
  }
  // So few active tiles that all of the batch element is reused? Each warp counts them by itself.
#pragma unroll 1
  for (int head = lane + 32; head < p.heads; head += 32) active += counts[head];
  active = __reduce_add_sync(kWholeWarp, active);
  const bool none =
      p.s_q > 0 && static_cast<double>(active) <= static_cast<double>(p.s_q) * static_cast<double>(p.tiles());
  if (to != nullptr) *to = static_cast<uint8_t>(none ? 0 : byte);
}

}  // namespace

void launch_pack(const SelectProblem& p, int device, cudaStream_t stream) {
  const int64_t bytes = p.skip_bytes + p.cache_bytes;
  launch_next(pack_kernel, "pack_kernel", p, dim3((bytes + kThreads - 1) / kThreads, p.batch), kThreads, 0, device,
              stream);
}

}  // namespace flashomni::cuda
