// A group of lanes a token, a run of columns each. It goes over some heads of its token, so that the rotation
// is read once for all of them.
#include "src/cuda/common/norm_rope.cuh"

#include "src/cuda/common/launch.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 128;
#ifndef NR_GROUP
#define NR_GROUP 8
#endif
#ifndef NR_AT_ONCE
#define NR_AT_ONCE 4
#endif
#ifndef NR_MIN
#define NR_MIN 7
#endif
constexpr int kHeadsAGroup = NR_GROUP, kAtOnce = NR_AT_ONCE;

template <class Element, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kThreads, NR_MIN) norm_rope_kernel(const __grid_constant__ NormRopeProblems q) {
  const NormRopeProblem& p = q.of[blockIdx.z / q.batch];
  const int batch = blockIdx.z % q.batch;
  const int lane = threadIdx.x % kLanes, column = lane * kRun;
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool works = row < p.rows && column < p.dim;  // the others take part in sums alone
  const int64_t position = p.row_offset + row;
  Element* x = static_cast<Element*>(p.x) + batch * p.strides[0] + row * p.strides[1] + column;
  const ActiveHeads active_heads(p, batch, position);
  HalfRun<Element> weight{};
  float cosine[kRun] = {}, sine[kRun] = {};
  if (works && p.weight != nullptr)
    weight = load_run(static_cast<const Element*>(p.weight) + column, kAligned);
  if (works && p.cos != nullptr) {
    load_floats(p.cos + position * p.cos_stride + column, kAligned, cosine);
    load_floats(p.sin + position * p.sin_stride + column, kAligned, sine);
  }
  const int first = blockIdx.y * kHeadsAGroup, last = min(p.heads, first + kHeadsAGroup);
  x += first * p.strides[2];
  for (int head = first; head < last; head += kAtOnce, x += kAtOnce * p.strides[2]) {
    HalfRun<Element> part[kAtOnce] = {};
    bool active[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      active[i] = works && head + i < last && active_heads.has(head + i);
      if (active[i]) part[i] = load_run(x + i * p.strides[2], kAligned);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float values[kRun];
      keep_packed(part[i]);
      to_floats(part[i], values);
      if (p.weight != nullptr) {
        float factors[kRun];
        keep_packed(weight);
        to_floats(weight, factors);
        normalize<kLanes>(p, factors, values);
      }
      if (p.cos != nullptr) rotate(cosine, sine, values);
      if (active[i]) store_run(x + i * p.strides[2], from_floats<Element>(values), kAligned);
    }
  }
}

void norm_rope_each_head(const NormRopeProblems& q, DType dtype, cudaStream_t stream) {
  with_half_type(dtype, "x", [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    with_lanes(q.of[0].dim, [&](auto lanes) {
      const int rows = kThreads / lanes;
      const dim3 grid((q.of[0].rows + rows - 1) / rows, (q.most_heads() + kHeadsAGroup - 1) / kHeadsAGroup,
                      q.grid_z());
      with_alignment(q, [&](auto aligned) {
        norm_rope_kernel<Element, decltype(lanes)::value, decltype(aligned)::value><<<grid, kThreads, 0, stream>>>(q);
      });
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
