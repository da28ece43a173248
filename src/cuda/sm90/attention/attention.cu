#include "src/cuda/sm90/attention/attention.h"

#include <algorithm>
#include <cmath>

#include "src/cuda/sm90/attention/kernels.h"
#include "src/cuda/sm90/attention/plan.h"
#include "src/cuda/sm90/attention/split.cuh"
#include "src/cuda/sm90/attention/summaries.h"
#include "src/cuda/sm90/launch.h"
#include "src/cuda/sm90/tensor_map.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr int64_t kAlignment = 256;

bool is_ragged(const AttentionArguments& a) {
  return a.q_indptr.present();
}
int64_t heads_of(const TensorView& t) {
  return t.size(t.ndim - 2);
}
int64_t head_dim_of(const AttentionArguments& a) {
  return a.q.size(a.q.ndim - 1);
}
int64_t tokens_of(const TensorView& t) {
  return t.size(t.ndim - 3);
}

Problem problem_of(const AttentionArguments& a) {
  Problem p{};
  p.cache = bits_of(a.symbols.cache, a.symbols.cache_indptr);
  p.skip = bits_of(a.symbols.skip, a.symbols.skip_indptr);
  if (is_ragged(a)) p.q_indptr = a.q_indptr.as<const int32_t>(), p.kv_indptr = a.kv_indptr.as<const int32_t>();
  if (a.kv_block_len.present()) p.block_len = a.kv_block_len.as<const int32_t>();
  p.batch = static_cast<int>(is_ragged(a) ? a.q_indptr.size(0) - 1 : a.q.size(0));
  p.heads = static_cast<int>(heads_of(a.q));
  p.q_tokens = static_cast<int>(tokens_of(a.q)), p.kv_tokens = static_cast<int>(tokens_of(a.k));
  p.block_q = a.symbols.block_q, p.block_kv = a.symbols.block_kv;
  p.causal = a.causal, p.summaries = a.k_mean.present();
  return p;
}

/// The kernel's own head_dim.
int padded_head_dim(const AttentionArguments& a) {
  const int64_t d = head_dim_of(a);
  return d <= 64 ? 64 : d <= 96 ? 96 : d <= 128 ? 128 : 256;
}

/// Where the parts of the workspace lie, in bytes.
struct Layout {
  int64_t control, items, partial, k_mean, v_mean, arrivals, parts, end;
  int arrival_count;

  Layout(const AttentionArguments& a, const Problem& p) {
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const int64_t begin = at;
      at += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return begin;
    };
    const int padded = padded_head_dim(a);
    const int ctas = multiprocessors(a.q.device.id) * ctas_an_sm(padded, p.block_q);
    const int consumers = p.block_q / 64;
    const int64_t split_tiles = std::min<int64_t>(ctas - 1, most_tiles(p));
    const int64_t most = std::min<int64_t>(most_parts(ctas), split_tiles * kMostParts);
    arrival_count = static_cast<int>(split_tiles * consumers * 4);
    control = take(sizeof(Control));
    items = take(most_tiles(p) * int64_t(sizeof(Item)));
    partial = take(p.block_len != nullptr ? ceil_div(p.kv_tokens, p.block_kv * kBitsAWord) * 4 : 0);
    k_mean = take(p.summaries ? a.k_mean.numel() * 2 : 0);
    v_mean = take(p.summaries ? a.v_mean.numel() * 2 : 0);
    arrivals = take(arrival_count * 4);
    parts = take(most * consumers * (padded / 8 + 1) * 128 * int64_t(sizeof(float4)));
    end = at;
  }
};

MapView view_of(const TensorView& t, bool ragged) {
  const int d = t.ndim;
  return {t.data, t.dtype, ragged ? 1 : t.size(0), t.size(d - 3), t.size(d - 2), t.size(d - 1),
          ragged ? 0 : t.strides[0], t.strides[d - 3], t.strides[d - 2]};
}

MapView view_of_summaries(const TensorView& mean, DType dtype, void* data) {
  const int64_t heads = mean.size(2), columns = mean.size(3);
  return {data, dtype, mean.size(0), mean.size(1), heads, columns, mean.size(1) * heads * columns, heads * columns,
          columns};
}

/// How the loader reads K, V and their summaries.
CUtensorMap block_map(const MapView& view, const Problem& problem, int padded, const char* name) {
  const int step = step_keys(padded, problem.block_q), rows = std::min(step, problem.block_kv);
  if (!reads_panels(padded)) return make_tensor_map(view, rows, name);
  return make_panel_map(view, rows, rows == step ? padded / 64 : 1, name);
}

void check_served(const AttentionArguments& a) {
  if (!(a.scale >= 0))
    throw Error(ErrorKind::kNotImplemented, text("scale: expected a positive number (cuda_sm90), got ", a.scale));
  for (const TensorView* t : {&a.q, &a.k})
    for (int i = 0; i < t->ndim; ++i)
      if (t->size(i) > INT32_MAX / 2)
        throw Error(ErrorKind::kNotImplemented, text(t == &a.q ? "q" : "k", ": expected sizes below 2^30, got ", t->size(i)));
}

AttentionParameters parameters_of(const AttentionArguments& a, const Problem& problem, const Grouping& grouping,
                                  const Layout& layout, unsigned char* workspace) {
  const bool ragged = is_ragged(a);
  const int padded = padded_head_dim(a);
  AttentionParameters p{};
  p.q = make_tensor_map(view_of(a.q, ragged), 64, "q");
  p.out = make_tensor_map(view_of(a.out, ragged), 64, "out");
  const bool keys = problem.kv_tokens > 0;  // without any, no copy is made and any map does
  p.k = keys ? block_map(view_of(a.k, ragged), problem, padded, "k") : p.q;
  p.v = keys ? block_map(view_of(a.v, ragged), problem, padded, "v") : p.q;
  if (problem.summaries && keys) {
    p.k_mean = block_map(view_of_summaries(a.k_mean, a.q.dtype, workspace + layout.k_mean), problem, padded, "k_mean");
    p.v_mean = block_map(view_of_summaries(a.v_mean, a.q.dtype, workspace + layout.v_mean), problem, padded, "v_mean");
  }
  p.problem = problem, p.grouping = grouping;
  p.parts = reinterpret_cast<float4*>(workspace + layout.parts);
  p.arrivals = reinterpret_cast<int*>(workspace + layout.arrivals);
  if (problem.block_len != nullptr) p.problem.partial = reinterpret_cast<uint32_t*>(workspace + layout.partial);
  p.items = reinterpret_cast<Item*>(workspace + layout.items);
  p.control = reinterpret_cast<Control*>(workspace + layout.control);
  p.out_data = a.out.as<unsigned char>();
  p.out_batch_stride = ragged ? 0 : a.out.strides[0];
  p.out_token_stride = a.out.strides[a.out.ndim - 3], p.out_head_stride = a.out.strides[a.out.ndim - 2];
  if (a.lse.present()) {
    p.lse = a.lse.as<float>();
    p.lse_batch_stride = ragged ? 0 : a.lse.strides[0];
    p.lse_token_stride = a.lse.strides[a.lse.ndim - 2], p.lse_head_stride = a.lse.strides[a.lse.ndim - 1];
  }
  p.head_dim = static_cast<int>(head_dim_of(a));
  p.kv_group = static_cast<int>(heads_of(a.q) / heads_of(a.k));
  const float scale = a.scale == 0 ? 1 / std::sqrt(static_cast<float>(p.head_dim)) : a.scale;
  p.scale_log2 = scale * 1.4426950408889634f, p.inverse_scale_log2 = 1.0f / p.scale_log2;
  return p;
}

}  // namespace

size_t attention_workspace(const AttentionArguments& a, const Context&) {
  return static_cast<size_t>(Layout(a, problem_of(a)).end);
}

void attention(const AttentionArguments& a, const Context& context) {
  check_served(a);
  const Problem problem = problem_of(a);
  const Layout layout(a, problem);
  const int padded = padded_head_dim(a), device = a.q.device.id;
  const Grouping grouping =
      grouping_of(problem, int64_t(problem.kv_tokens) * padded * 4 * heads_of(a.k) / heads_of(a.q));
  auto* workspace = static_cast<unsigned char*>(context.workspace);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const AttentionParameters p = parameters_of(a, problem, grouping, layout, workspace);
  if (problem.summaries && a.k_mean.numel() > 0)
    convert_summaries(a.k_mean, a.v_mean, a.q.dtype, workspace + layout.k_mean, workspace + layout.v_mean, stream);
  uint32_t* partial =
      problem.block_len != nullptr ? reinterpret_cast<uint32_t*>(workspace + layout.partial) : nullptr;
  launch_plan({problem, grouping, const_cast<Item*>(p.items), p.control, partial, p.arrivals, layout.arrival_count},
              stream);
  switch (padded) {
    case 64:
      return launch_head_dim<64>(p, a.q.dtype, problem.block_q, device, stream);
    case 96:
      return launch_head_dim<96>(p, a.q.dtype, problem.block_q, device, stream);
    case 128:
      return launch_head_dim<128>(p, a.q.dtype, problem.block_q, device, stream);
    default:
      return launch_head_dim<256>(p, a.q.dtype, problem.block_q, device, stream);
  }
}

}  // namespace flashomni::cuda::sm90
