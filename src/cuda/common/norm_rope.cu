// A group of lanes a token, a run of columns each. It goes over some heads of its token, so that the rotation
// is read once for all of them.
#include "src/cuda/common/norm_rope.cuh"

#include "src/cuda/common/launch.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeadsAGroup = 8;

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
    if (p.weight != nullptr) normalize<kLanes>(p, weight, values);
    if (p.cos != nullptr) rotate(cosine, sine, values);
    if (active) store_run(x + head * p.strides[2], from_floats<Element>(values), p.aligned);
  }
}

}  // namespace

void norm_rope(const NormRopeArguments& a, const Context& context) {
  const NormRopeProblem p = problem_of(a);
  with_half_type(a.x.dtype, "x", [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    with_lanes(p.dim, [&](auto lanes) {
      const int rows = kThreads / lanes;
      const dim3 grid((p.rows + rows - 1) / rows, (p.heads + kHeadsAGroup - 1) / kHeadsAGroup,
                      static_cast<unsigned>(a.x.size(0)));
      norm_rope_kernel<Element, decltype(lanes)::value>
          <<<grid, kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(p);
    });
  });
  check_cuda(cudaGetLastError(), "norm_rope_kernel");
}

}  // namespace flashomni::cuda
