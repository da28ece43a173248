// Norm over all heads of a token, then the rotation of each head, in one read and one write: the token's threads
// hold it in registers while they add its squares up.
//
// A thread has the same columns of every few heads, so that it reads one piece of the rotation. As few warps as can
// hold a token take it, and ask for all of it at once. Where that is one, it waits for no other, and a CTA takes
// several tokens.
#include "src/cuda/common/launch.h"
#include "src/cuda/common/norm_rope.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kMostHeads = 10;      // of a thread: four registers each
constexpr int kThreads = 128;       // of a CTA that takes several tokens
constexpr int kMostThreads = 320;   // of one that takes one

__device__ inline bool any_of_token(bool value) {
  return blockDim.x == kWarp ? __any_sync(~0u, value) : __syncthreads_or(value);
}

/// threadIdx.y: the CTA's tokens. kHeads: at most, of a thread.
template <class Element, int kHeads, bool kAligned>
__global__ void __launch_bounds__(kMostThreads, 2)
    norm_rope_across_heads_kernel(const __grid_constant__ NormRopeProblems q) {
  __shared__ float sums[kMostThreads / kWarp];
  const NormRopeProblem& p = q.of[blockIdx.z / q.batch];
  const int batch = blockIdx.z % q.batch, row = blockIdx.x * blockDim.y + threadIdx.y;
  const int runs = p.dim / kRun, at_once = blockDim.x / runs;  // at_once: heads
  const int first = threadIdx.x / runs, column = threadIdx.x % runs * kRun;
  const bool works = row < p.rows && first < at_once;  // the others take part in sums alone
  const int64_t position = p.row_offset + row;

  uint32_t active = 0;  // a bit a head of this thread
  const ActiveHeads active_heads(p, batch, position);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * at_once;
    active |= uint32_t{works && head < p.heads && active_heads.has(head)} << i;
  }
  if (p.cache != nullptr && !any_of_token(active != 0)) return;  // nothing is written: nothing is read

  Element* x = static_cast<Element*>(p.x) + batch * p.strides[0] + row * p.strides[1] + column;
  HalfRun<Element> part[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first + i * at_once;
    if (works && head < p.heads) part[i] = load_run(x + head * p.strides[2], kAligned);
  }
  float cosine[kRun] = {}, sine[kRun] = {};
  if (works && p.cos != nullptr) {
    load_floats(p.cos + position * p.cos_stride + column, kAligned, cosine);
    load_floats(p.sin + position * p.sin_stride + column, kAligned, sine);
  }

  float values[kRun], squares = 0;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    to_floats(part[i], values);
    squares += squares_of_run(values);
    keep_packed(part[i]);
  }
  const float factor = norm_factor(p, sum_of_row(squares, sums), p.heads * p.dim);

#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (!(active >> i & 1)) continue;
    const int head = first + i * at_once;
    float weight[kRun];
    to_floats(load_run(static_cast<const Element*>(p.weight) + head * p.dim + column, kAligned), weight);
    to_floats(part[i], values);
    scale(factor, weight, values);
    if (p.cos != nullptr) rotate(cosine, sine, values);
    store_run(x + head * p.strides[2], from_floats<Element>(values), kAligned);
  }
}

/// Heads that each of a token's threads has, where there are `warps` of them.
int heads_a_thread(const NormRopeProblems& q, int warps) {
  const int at_once = warps * kWarp / (q.of[0].dim / kRun);
  return (q.most_heads() + at_once - 1) / at_once;
}

/// Calls f with at least `heads` as a constant.
template <class F>
void with_heads(int heads, F&& f) {
  if (heads <= 4) return f(std::integral_constant<int, 4>());
  if (heads <= 8) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, kMostHeads>());
}

}  // namespace

void norm_rope_across_heads(const NormRopeProblems& q, DType dtype, cudaStream_t stream) {
  int warps = 1;
  while (warps <= kMostThreads / kWarp && heads_a_thread(q, warps) > kMostHeads) ++warps;
  if (warps > kMostThreads / kWarp) {
    const int dim = q.of[0].dim;
    fail(ErrorKind::kNotImplemented, "weight",
         text("a norm over at most ", kMostHeads * (kMostThreads / (dim / kRun)), " heads of ", dim),
         text(q.most_heads(), " heads"));
  }
  with_heads(heads_a_thread(q, warps), [&](auto heads) {
    const dim3 block(warps * kWarp, warps == 1 ? kThreads / kWarp : 1);
    const dim3 grid((q.of[0].rows + block.y - 1) / block.y, 1, q.grid_z());
    with_half_type(dtype, "x", [&](auto* type) {
      using Element = std::remove_pointer_t<decltype(type)>;
      with_alignment(q, [&](auto aligned) {
        norm_rope_across_heads_kernel<Element, decltype(heads)::value, decltype(aligned)::value>
            <<<grid, block, 0, stream>>>(q);
      });
    });
  });
  check_cuda(cudaGetLastError(), "norm_rope_across_heads_kernel");
}

}  // namespace flashomni::cuda
