// A group of lanes a token, a run of columns each. It goes over some heads of its token, so that the rotation
// is read once for all of them.
#include <algorithm>

#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/half_run.cuh"
#include "src/cuda/common/launch.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeadsAGroup = 8;

struct NormRopeProblem {
  void* x;
  const void* weight;  // null: no norm
  const float *cos, *sin;  // null: no rotation
  const uint8_t* cache;  // null: every tile is active
  int64_t strides[3], cos_stride, sin_stride, cache_stride, row_offset;
  int rows, heads, dim, block_q;
  float eps;
  bool aligned, weight_aligned, tables_aligned;
};

__device__ inline void load_floats(const float* from, bool aligned, float (&values)[kRun]) {
  if (aligned) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    const float all[kRun] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = all[i];
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = from[i];
  }
}

/// Lanes of a group: the next power of two that holds a row's runs.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kThreads) norm_rope_kernel(const __grid_constant__ NormRopeProblem p) {
  const int lane = threadIdx.x % kLanes, column = lane * kRun;
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool works = row < p.rows && column < p.dim;  // the others take part in sums alone
  const int64_t position = p.row_offset + row;
  Element* x = static_cast<Element*>(p.x) + blockIdx.z * p.strides[0] + row * p.strides[1] + column;
  const uint8_t* bits = p.cache == nullptr ? nullptr : p.cache + blockIdx.z * p.cache_stride;
  float weight[kRun] = {}, cosine[kRun] = {}, sine[kRun] = {};
  if (works && p.weight != nullptr)
    to_floats(load_run(static_cast<const Element*>(p.weight) + column, p.weight_aligned), weight);
  if (works && p.cos != nullptr) {
    load_floats(p.cos + position * p.cos_stride + column, p.tables_aligned, cosine);
    load_floats(p.sin + position * p.sin_stride + column, p.tables_aligned, sine);
  }
  const int last = min(p.heads, static_cast<int>(blockIdx.y + 1) * kHeadsAGroup);
#pragma unroll 2
  for (int head = blockIdx.y * kHeadsAGroup; head < last; ++head) {
    const int64_t bit = position / p.block_q * p.heads + head;
    const bool active = works && (bits == nullptr || (bits[bit >> 3] >> (bit & 7) & 1));
    float values[kRun] = {};
    if (active) to_floats(load_run(x + head * p.strides[2], p.aligned), values);
    if (p.weight != nullptr) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) squares += values[i] * values[i];
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        squares += __shfl_xor_sync(~0u, squares, distance);
      const float factor = 1.0f / sqrtf(squares / static_cast<float>(p.dim) + p.eps);
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] *= factor * weight[i];
    }
    if (p.cos != nullptr) {
#pragma unroll
      for (int i = 0; i < kRun; i += 2) {
        const float even = values[i], odd = values[i + 1];
        values[i] = even * cosine[i] - odd * sine[i];
        values[i + 1] = odd * cosine[i + 1] + even * sine[i + 1];
      }
    }
    if (active) store_run(x + head * p.strides[2], from_floats<Element>(values), p.aligned);
  }
}

template <class Element>
void launch_norm_rope(const NormRopeProblem& p, int batch, cudaStream_t stream) {
  const auto launch = [&](auto kernel, int lanes) {
    const int rows = kThreads / lanes;
    const dim3 grid((p.rows + rows - 1) / rows, (p.heads + kHeadsAGroup - 1) / kHeadsAGroup, batch);
    kernel<<<grid, kThreads, 0, stream>>>(p);
  };
  if (p.dim <= 64) return launch(norm_rope_kernel<Element, 8>, 8);
  if (p.dim <= 128) return launch(norm_rope_kernel<Element, 16>, 16);
  launch(norm_rope_kernel<Element, 32>, 32);
}

}  // namespace

void norm_rope(const NormRopeArguments& a, const Context& context) {
  NormRopeProblem p{};
  p.x = a.x.data;
  for (int i = 0; i < 3; ++i) p.strides[i] = a.x.strides[i];
  if (a.weight.present()) p.weight = a.weight.data, p.weight_aligned = runs_aligned(a.weight);
  if (a.cos.present()) {
    p.cos = a.cos.as<const float>(), p.sin = a.sin.as<const float>();
    p.cos_stride = a.cos.strides[0], p.sin_stride = a.sin.strides[0];
    p.tables_aligned = runs_aligned(a.cos) && runs_aligned(a.sin);
  }
  if (a.cache.present()) p.cache = a.cache.as<const uint8_t>(), p.cache_stride = a.cache.strides[0];
  p.row_offset = a.row_offset, p.block_q = a.block_q, p.eps = a.eps;
  p.rows = static_cast<int>(a.x.size(1)), p.heads = static_cast<int>(a.x.size(2));
  p.dim = static_cast<int>(a.x.size(3)), p.aligned = runs_aligned(a.x);
  with_half_type(a.x.dtype, "x", [&](auto* type) {
    launch_norm_rope<std::remove_pointer_t<decltype(type)>>(p, static_cast<int>(a.x.size(0)),
                                                            static_cast<cudaStream_t>(context.stream));
  });
  check_cuda(cudaGetLastError(), "norm_rope_kernel");
}

}  // namespace flashomni::cuda
