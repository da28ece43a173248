#include "src/cuda/sm90/gemm/gemm.h"
#include "src/cuda/sm90/gemm/gemm_q_consumer.cuh"
#include "src/cuda/sm90/gemm/host.h"
#include "src/cuda/sm90/gemm/plan.h"

namespace flashomni::cuda::sm90 {
namespace {

QProblem problem_of(const GemmQArguments& a) {
  const RowBlocks blocks(a.tiles, a.x.size(1));
  const int64_t head_features = a.weight.size(0) / a.tiles.heads;
  QProblem p{};
  p.cache = bits_of(a.tiles.cache, a.tiles.cache_indptr);
  p.batch = static_cast<int>(a.x.size(0)), p.heads = static_cast<int>(a.tiles.heads);
  const int groups = static_cast<int>((head_features + kGroupFeatures - 1) / kGroupFeatures);
  // Items of two tiles fill few rounds worse than they save copies.
  constexpr int kFewRounds = 8;
  const int64_t tiles = (blocks.count * a.tiles.block_q + 255) / 256 * p.heads * p.batch * groups;
  p.sharers = tiles < kFewRounds * multiprocessors(a.x.device.id) ? 1 : kMostSharers;
  p.shares_tokens = groups > 1 || p.sharers == 1;
  p.groups = p.shares_tokens ? (groups + p.sharers - 1) / p.sharers : 1;
  p.item_blocks = (p.shares_tokens ? 256 : p.sharers * 256) / a.tiles.block_q;
  p.first_block = blocks.first, p.blocks = blocks.count;
  p.block_q = a.tiles.block_q, p.row_offset = static_cast<int>(a.tiles.row_offset);
  p.clusters = clusters_of(a.x.device.id, p.sharers);
  return p;
}

/// Where the parts of the workspace lie, in bytes.
struct Layout {
  int64_t control = 0, items, end;

  explicit Layout(const QProblem& p) {
    items = aligned(sizeof(QControl));
    end = items + aligned(most_items(p) * int64_t(sizeof(QItem)));
  }
};

void check_served(const GemmQArguments& a, const QProblem& problem) {
  check_sizes(a.x, "x");
  check_sizes(a.weight, "weight");
  check_size(a.tiles.row_offset, "row_offset");
  const int64_t features = a.weight.size(0) / a.tiles.heads;
  if (features % 8 != 0 && a.tiles.heads > 1)
    throw Error(ErrorKind::kNotImplemented,
                text("weight: expected rows a head that are a multiple of 8 (cuda_sm90), got ",
                     a.weight.size(0), " / ", a.tiles.heads, " = ", features));
  check_plan_serves(problem);
}

}  // namespace

size_t gemm_q_workspace(const GemmQArguments& a, const Context&) {
  const QProblem problem = problem_of(a);
  check_served(a, problem);
  return static_cast<size_t>(Layout(problem).end);
}

void gemm_q(const GemmQArguments& a, const Context& context) {
  const QProblem problem = problem_of(a);
  check_served(a, problem);
  const Layout layout(problem);
  auto* workspace = static_cast<unsigned char*>(context.workspace);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const int64_t head_features = a.weight.size(0) / a.tiles.heads;
  QParameters p{};
  p.x = matrix_map(a.x, problem.block_q, "x");
  p.weight = matrix_map(a.weight, 64, "weight");
  p.out = output_of(a.out, a.tiles.heads, problem.block_q, "out");
  auto* items = reinterpret_cast<QItem*>(workspace + layout.items);
  p.items = items, p.control = reinterpret_cast<QControl*>(workspace + layout.control);
  p.bias = a.bias.present() ? a.bias.data : nullptr;
  p.weight_policy = weight_policy(a.weight);
  p.steps = static_cast<int>((a.weight.size(1) + GemmSizes::kStepK - 1) / GemmSizes::kStepK);
  p.heads = problem.heads, p.head_features = static_cast<int>(head_features);
  p.block_q = problem.block_q, p.activation = a.activation;
  p.sharers = problem.sharers, p.shares_tokens = problem.shares_tokens;
  launch_q_plan({problem, items, p.control}, stream);
  if (a.x.dtype == DType::kFloat16)
    launch_gemm<GemmQ<__half>>(p, a.x.device.id, stream);
  else
    launch_gemm<GemmQ<__nv_bfloat16>>(p, a.x.device.id, stream);
}

}  // namespace flashomni::cuda::sm90
