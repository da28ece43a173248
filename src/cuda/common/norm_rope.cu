// A group of lanes a token, a run of columns each. It goes over some heads of its token, so that the rotation
// is read once for all of them.
#include "src/cuda/common/norm_rope.cuh"

#include "src/cuda/common/launch.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeadsAGroup = 8;

template <class Element, int kLanes>
__global__ void __launch_bounds__(kThreads) norm_rope_kernel(const __grid_constant__ NormRopeProblems q) {
  const NormRopeProblem& p = q.of[blockIdx.z / q.batch];
  const int batch = blockIdx.z % q.batch;
  const int lane = threadIdx.x % kLanes, column = lane * kRun;
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool works = row < p.rows && column < p.dim;  // the others take part in sums alone
  const int64_t position = p.row_offset + row;
  Element* x = static_cast<Element*>(p.x) + batch * p.strides[0] + row * p.strides[1] + column;
  const uint8_t* bits = p.cache == nullptr ? nullptr : p.cache + batch * p.cache_stride;
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
    const bool active = works && is_active(p, bits, position, head);
    float values[kRun] = {};
    if (active) to_floats(load_run(x + head * p.strides[2], p.aligned), values);
    if (p.weight != nullptr) normalize<kLanes>(p, weight, values);
    if (p.cos != nullptr) rotate(cosine, sine, values);
    if (active) store_run(x + head * p.strides[2], from_floats<Element>(values), p.aligned);
  }
}

void norm_rope_each_head(const NormRopeProblems& q, DType dtype, cudaStream_t stream) {
  with_half_type(dtype, "x", [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    with_lanes(q.of[0].dim, [&](auto lanes) {
      const int rows = kThreads / lanes;
      const dim3 grid((q.of[0].rows + rows - 1) / rows, (q.most_heads() + kHeadsAGroup - 1) / kHeadsAGroup,
                      q.grid_z());
      norm_rope_kernel<Element, decltype(lanes)::value><<<grid, kThreads, 0, stream>>>(q);
    });
  });
  check_cuda(cudaGetLastError(), "norm_rope_kernel");
}

}  // namespace

void norm_rope(const NormRopeArguments& a, const Context& context) {
  NormRopeProblems each_head{}, across_heads{};
  each_head.batch = across_heads.batch = static_cast<int>(a.x.size(0));
  const auto add = [&](const TensorView& x, const TensorView& weight, const TensorView& cache) {
    if (!weight.present() && !a.cos.present()) return;  // nothing to do
    const bool across = weight.present() && weight.size(0) != x.size(3);
    (across ? across_heads : each_head).add(problem_of(a, x, weight, cache));
  };
  add(a.x, a.weight, a.cache);
  if (a.keys.present()) add(a.keys, a.keys_weight, TensorView{});
  const auto stream = static_cast<cudaStream_t>(context.stream);
  // First, as it may refuse its width.
  if (across_heads.count > 0) norm_rope_across_heads(across_heads, a.x.dtype, stream);
  if (each_head.count > 0) norm_rope_each_head(each_head, a.x.dtype, stream);
}

}  // namespace flashomni::cuda
