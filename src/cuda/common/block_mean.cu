// A CTA a (block of tokens, head): its threads take the rows in turns, a run of columns each, and add their
// sums up in shared memory, always in the same order.
#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/half_run.cuh"
#include "src/cuda/common/launch.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // rows that a thread asks for at a time

struct MeanProblem {
  const void* x;
  float* out;
  int64_t x_strides[3], out_strides[3];  // batch, token or block, head
  int tokens, dim, block;
  bool aligned;
};

template <class Element>
__global__ void __launch_bounds__(kThreads) block_mean_kernel(const __grid_constant__ MeanProblem p) {
  __shared__ float sums[kThreads][kRun];
  const int head = blockIdx.x, block = blockIdx.y, batch = blockIdx.z;
  const int runs = p.dim / kRun, lanes = kThreads / runs;  // rows at work at once
  const int run = threadIdx.x % runs, lane = threadIdx.x / runs;
  const int first = block * p.block, rows = min(p.block, p.tokens - first);
  const Element* x = static_cast<const Element*>(p.x) + batch * p.x_strides[0] + first * p.x_strides[1] +
                     head * p.x_strides[2] + run * kRun;
  float sum[kRun] = {};
  if (lane < lanes) {
    for (int row = lane; row < rows; row += lanes * kInFlight) {
      HalfRun<Element> part[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (row + i * lanes < rows) part[i] = load_run(x + (row + i * lanes) * p.x_strides[1], p.aligned);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (row + i * lanes >= rows) break;
        float values[kRun];
        to_floats(part[i], values);
#pragma unroll
        for (int e = 0; e < kRun; ++e) sum[e] += values[e];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kRun; ++e) sums[threadIdx.x][e] = sum[e];
  __syncthreads();
  float* out =
      p.out + batch * p.out_strides[0] + block * p.out_strides[1] + head * p.out_strides[2];
  for (int d = threadIdx.x; d < p.dim; d += kThreads) {
    float total = 0;
    for (int i = 0; i < lanes; ++i) total += sums[i * runs + d / kRun][d % kRun];
    out[d] = total / static_cast<float>(rows);
  }
}

}  // namespace

void block_mean(const BlockMeanArguments& a, const Context& context) {
  if (a.similarity.present()) {  // a row's length is needed before its columns can be added
    NormRopeMeanArguments same;
    same.rows.x = a.x, same.mean = a.out, same.similarity = a.similarity, same.block = a.block;
    return cuda::norm_rope_mean(same, context);
  }
  MeanProblem p{};
  p.x = a.x.data, p.out = a.out.as<float>();
  for (int i = 0; i < 3; ++i) p.x_strides[i] = a.x.strides[i], p.out_strides[i] = a.out.strides[i];
  p.tokens = static_cast<int>(a.x.size(1)), p.dim = static_cast<int>(a.x.size(3));
  p.block = a.block, p.aligned = runs_aligned(a.x);
  const dim3 grid(static_cast<unsigned>(a.out.size(2)), static_cast<unsigned>(a.out.size(1)),
                  static_cast<unsigned>(a.out.size(0)));
  with_half_type(a.x.dtype, "x", [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    block_mean_kernel<Element><<<grid, kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "block_mean_kernel");
}

}  // namespace flashomni::cuda
