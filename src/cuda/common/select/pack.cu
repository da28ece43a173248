// S_q, and the bits: a thread a byte of S_s or S_c.
#include "src/cuda/common/chain.cuh"
#include "src/cuda/common/select/problem.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256;

/// Whether so few tiles of the batch element are active that all of it is reused.
__device__ bool reuses_all(const SelectProblem& p, int batch) {
  __shared__ unsigned long long active;
  if (threadIdx.x == 0) active = 0;
  __syncthreads();
  for (int head = threadIdx.x; head < p.heads; head += kThreads)
    atomicAdd(&active, static_cast<unsigned long long>(p.counts[int64_t(batch) * p.heads + head]));
  __syncthreads();
  return p.s_q > 0 && static_cast<double>(active) <= static_cast<double>(p.s_q) * static_cast<double>(p.tiles());
}

/// Byte `k` of S_s. Rows follow each other bit by bit, so that it may hold bits of several.
__device__ uint8_t skip_byte(const SelectProblem& p, int batch, int64_t k) {
  const uint8_t* active = p.active + batch * p.tiles();
  int64_t tile = k * 8 / p.kv_blocks;
  int j = static_cast<int>(k * 8 - tile * p.kv_blocks);
  unsigned byte = 0;
  for (int filled = 0; filled < 8 && tile < p.tiles(); ++tile, j = 0) {
    const int bits = min(8 - filled, p.kv_blocks - j);
    if (active[tile]) {
      const uint8_t* row = p.kept + (batch * p.tiles() + tile) * p.kept_bytes() + j / 8;
      const unsigned both = row[0] | row[1] << 8;
      byte |= (both >> j % 8 & ((1u << bits) - 1)) << filled;
    }
    filled += bits;
  }
  return static_cast<uint8_t>(byte);
}

/// Byte `k` of S_c.
__device__ uint8_t cache_byte(const SelectProblem& p, int batch, int64_t k) {
  const uint8_t* active = p.active + batch * p.tiles();
  unsigned byte = 0;
  for (int bit = 0; bit < 8 && k * 8 + bit < p.tiles(); ++bit) byte |= unsigned{active[k * 8 + bit]} << bit;
  return static_cast<uint8_t>(byte);
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ SelectProblem p) {
  let_next_start();
  wait_for_previous();
  const int batch = blockIdx.y;
  const bool none = reuses_all(p, batch);
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x, in_cache = k - p.skip_bytes;
  if (k < p.skip_bytes) {
    p.skip_bits[batch * p.skip_stride + k] = none ? 0 : skip_byte(p, batch, k);
  } else if (in_cache < p.cache_bytes) {
    p.cache_bits[batch * p.cache_stride + in_cache] = none ? 0 : cache_byte(p, batch, in_cache);
  }
}

}  // namespace

void launch_pack(const SelectProblem& p, int device, cudaStream_t stream) {
  const int64_t bytes = p.skip_bytes + p.cache_bytes;
  launch_next(pack_kernel, "pack_kernel", p, dim3((bytes + kThreads - 1) / kThreads, p.batch), kThreads, 0, device,
              stream);
}

}  // namespace flashomni::cuda
