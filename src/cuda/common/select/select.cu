#include "src/cuda/common/select/select.h"

#include <cmath>

#include "src/cuda/common/launch.h"
#include "src/cuda/common/select/problem.cuh"

namespace flashomni::cuda {
namespace {

constexpr int64_t kAlignment = 256;

SelectProblem problem_of(const SelectArguments& a) {
  SelectProblem p{};
  p.q_mean = a.q_mean.as<const float>(), p.k_mean = a.k_mean.as<const float>();
  for (int i = 0; i < 3; ++i) p.q_strides[i] = a.q_mean.strides[i], p.k_strides[i] = a.k_mean.strides[i];
  if (a.ramp.present()) p.ramp = a.ramp.as<const float>();
  if (a.k_similarity.present()) {
    p.k_similarity = a.k_similarity.as<const float>();
    for (int i = 0; i < 3; ++i) p.similarity_strides[i] = a.k_similarity.strides[i];
    p.self_similarity = a.self_similarity;
  }
  p.tau_q = a.tau_q, p.tau_kv = a.tau_kv, p.s_q = a.s_q;
  p.batch = static_cast<int>(a.q_mean.size(0)), p.heads = static_cast<int>(a.q_mean.size(2));
  p.heads_a_kv_head = static_cast<int>(a.q_mean.size(2) / a.k_mean.size(2));
  p.dim = static_cast<int>(a.q_mean.size(3));
  p.scale = a.scale != 0 ? a.scale : 1.0f / std::sqrt(static_cast<float>(p.dim));
  p.q_blocks = static_cast<int>(a.q_mean.size(1)), p.kv_blocks = static_cast<int>(a.k_mean.size(1));
  p.kv_blocks_a_q_block = a.symbols.block_q / a.symbols.block_kv;
  if (a.text_length > 0) {
    const int64_t end = a.text_start + a.text_length;
    p.text_q_begin = static_cast<int>(a.text_start / a.symbols.block_q);
    p.text_q_end = static_cast<int>(ceil_div(end, a.symbols.block_q));
    p.text_kv_begin = static_cast<int>(a.text_start / a.symbols.block_kv);
    p.text_kv_end = static_cast<int>(ceil_div(end, a.symbols.block_kv));
  }
  p.caches = a.text_length > 0 && a.tau_q > 0;
  p.cache_bits = a.symbols.cache.as<uint8_t>(), p.skip_bits = a.symbols.skip.as<uint8_t>();
  p.cache_stride = a.symbols.cache.strides[0], p.skip_stride = a.symbols.skip.strides[0];
  p.cache_bytes = a.symbols.cache.size(1), p.skip_bytes = a.symbols.skip.size(1);
  return p;
}

/// Puts the parts of the workspace into `p`; returns their bytes.
int64_t place_workspace(SelectProblem& p, unsigned char* workspace) {
  int64_t at = 0;
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(workspace + at);
    at += (count * int64_t(sizeof(*part)) + kAlignment - 1) / kAlignment * kAlignment;
  };
  const int64_t pairs = int64_t(p.batch) * p.heads;
  take(p.kept, p.batch * p.tiles() * p.kept_bytes());
  take(p.text_rows, p.caches ? pairs * p.text_q() * p.kv_blocks : 0);
  take(p.text_columns, p.caches ? pairs * p.text_kv() * p.q_blocks : 0);
  take(p.active, p.batch * p.tiles());
  take(p.counts, pairs);
  return at;
}

void check_served(const SelectArguments& a, const SelectProblem& p, int device) {
  const int most = most_shared_bytes(device);
  if (skip_shared_bytes(p) <= most && cache_shared_bytes(p) <= most && p.heads <= 65535 && p.batch <= 65535)
    return;
  fail(ErrorKind::kNotImplemented, "q_mean, k_mean", "rows of scores that fit into shared memory",
       text(describe(a.q_mean), " and ", describe(a.k_mean)));
}

}  // namespace

int most_shared_bytes(int device) {
  // The kernels have some of their own, of fixed size.
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device) - 1024;
}

size_t select_workspace(const SelectArguments& a, const Context&) {
  SelectProblem p = problem_of(a);
  return static_cast<size_t>(place_workspace(p, nullptr));
}

void select(const SelectArguments& a, const Context& context) {
  const int device = a.q_mean.device.id;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  SelectProblem p = problem_of(a);
  check_served(a, p, device);
  place_workspace(p, static_cast<unsigned char*>(context.workspace));
  launch_skip(p, device, stream);
  launch_cache(p, device, stream);
  launch_pack(p, device, stream);
}

}  // namespace flashomni::cuda
