// Norm over all heads of a token, then the rotation of each head, in one read and one write: the token's threads
// hold it in registers while they add its squares up.
//
// A thread has the same columns of every few heads, so that it reads one piece of the rotation. A narrow token
// takes few threads; then a CTA takes several tokens.
#include "src/cuda/common/launch.h"
#include "src/cuda/common/norm_rope.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 768;  // of a token: more would leave them too few registers
constexpr int kThreads = 256;      // of a CTA that takes several

/// threadIdx.y: the CTA's tokens. kHeads: at most, of a thread.
template <class Element, int kHeads>
__global__ void __launch_bounds__(kMostThreads)
    norm_rope_across_heads_kernel(const __grid_constant__ NormRopeProblems q) {
  __shared__ float sums[kMostThreads / kWarp];
  const NormRopeProblem& p = q.of[blockIdx.z / q.batch];
  const int batch = blockIdx.z % q.batch, row = blockIdx.x * blockDim.y + threadIdx.y;
  const int runs = p.dim / kRun, at_once = blockDim.x / runs;  // at_once: heads
  const int first = threadIdx.x / runs, column = threadIdx.x % runs * kRun;
  const bool works = row < p.rows && first < at_once;  // the others take part in sums alone
  const int64_t position = p.row_offset + row;
  const uint8_t* bits = p.cache == nullptr ? nullptr : p.cache + batch * p.cache_stride;

  bool active[kHeads], any = false;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * at_once;
    active[i] = works && head < p.heads && is_active(p, bits, position, head);
    any |= active[i];
  }
  if (bits != nullptr && !__syncthreads_or(any)) return;  // nothing is written: nothing is read

  Element* x = static_cast<Element*>(p.x) + batch * p.strides[0] + row * p.strides[1] + column;
  HalfRun<Element> part[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * at_once;
    if (works && head < p.heads) part[i] = load_run(x + head * p.strides[2], p.aligned);
  }
  float cosine[kRun] = {}, sine[kRun] = {};
  if (works && p.cos != nullptr) {
    load_floats(p.cos + position * p.cos_stride + column, p.tables_aligned, cosine);
    load_floats(p.sin + position * p.sin_stride + column, p.tables_aligned, sine);
  }

  float values[kRun], squares = 0;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    to_floats(part[i], values);
    squares += squares_of_run(values);
  }
  squares = sum_of_lanes<kWarp>(squares);
  const int warps = blockDim.x / kWarp, first_warp = threadIdx.y * warps;
  if (threadIdx.x % kWarp == 0) sums[first_warp + threadIdx.x / kWarp] = squares;
  __syncthreads();
  squares = 0;
  for (int warp = 0; warp < warps; ++warp) squares += sums[first_warp + warp];
  const float factor = norm_factor(p, squares, p.heads * p.dim);

#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (!active[i]) continue;
    const int head = first + i * at_once;
    float weight[kRun];
    to_floats(load_run(static_cast<const Element*>(p.weight) + head * p.dim + column, p.weight_aligned), weight);
    to_floats(part[i], values);
    scale(factor, weight, values);
    if (p.cos != nullptr) rotate(cosine, sine, values);
    store_run(x + head * p.strides[2], from_floats<Element>(values), p.aligned);
  }
}

/// Threads of a token where each takes up to `heads` heads: whole warps.
int threads_of(const NormRopeProblems& q, int heads) {
  const int needed = (q.most_heads() + heads - 1) / heads * (q.of[0].dim / kRun);
  return (needed + kWarp - 1) / kWarp * kWarp;
}

}  // namespace

void norm_rope_across_heads(const NormRopeProblems& q, DType dtype, cudaStream_t stream) {
  const auto launch = [&](auto heads) {
    const int threads = threads_of(q, heads);
    if (threads > kMostThreads) {
      const int dim = q.of[0].dim;
      fail(ErrorKind::kNotImplemented, "weight",
           text("a norm over at most ", heads * (kMostThreads / (dim / kRun)), " heads of ", dim),
           text(q.most_heads(), " heads"));
    }
    const dim3 block(threads, threads < kThreads ? kThreads / threads : 1);
    const dim3 grid((q.of[0].rows + block.y - 1) / block.y, 1, q.grid_z());
    with_half_type(dtype, "x", [&](auto* type) {
      using Element = std::remove_pointer_t<decltype(type)>;
      norm_rope_across_heads_kernel<Element, decltype(heads)::value><<<grid, block, 0, stream>>>(q);
    });
  };
  // Four heads a thread keep much of the memory in flight; of a narrow token two make fewer idle lanes.
  if (threads_of(q, 2) <= kThreads / 2) {
    launch(std::integral_constant<int, 2>());
  } else {
    launch(std::integral_constant<int, 4>());
  }
  check_cuda(cudaGetLastError(), "norm_rope_across_heads_kernel");
}

}  // namespace flashomni::cuda
