// A group of lanes a token, a run of columns each. It goes over some heads of its token, so that the rotation
// is read once for all of them.
#include "src/cuda/common/norm_rope.cuh"

#include <algorithm>

#include "src/cuda/common/launch.h"

namespace flashomni::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;    // heads whose reads are under way at a time
constexpr int kFewHeads = 8;  // of a group, where there would be too few CTAs else
constexpr int kManyCtas = 4000;

template <class Element, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kThreads, 7) norm_rope_kernel(const __grid_constant__ NormRopeProblems q, int group) {
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
  const int first = blockIdx.y * group, last = min(p.heads, first + group);
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
      const unsigned tokens = kThreads / lanes, ctas = (q.of[0].rows + tokens - 1) / tokens;
      const int heads = q.most_heads(), group = int64_t{ctas} * q.grid_z() < kManyCtas ? std::min(kFewHeads, heads) : heads;
      const dim3 grid(ctas, (heads + group - 1) / group, q.grid_z());
      with_alignment(q, [&](auto aligned) {
        norm_rope_kernel<Element, decltype(lanes)::value, decltype(aligned)::value><<<grid, kThreads, 0, stream>>>(q, group);
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
