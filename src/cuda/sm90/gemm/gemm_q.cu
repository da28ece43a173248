#include "src/cuda/sm90/gemm/gemm.h"

#include <algorithm>

#include "src/cuda/sm90/gemm/counter.h"
#include "src/cuda/sm90/gemm/gemm_q_consumer.cuh"
#include "src/cuda/sm90/gemm/host.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr int kBandTokens = 2048;
constexpr int kMostLists = 4096, kMostRowBlocks = UINT16_MAX;
constexpr int kMostCounts = 2 * kMostLists;  // of a block's table

/// The problem, how many blocks of a cluster take its items, and what they share. Arguments are served.
struct Division {
  QProblem problem{};
  int sharers;
  bool shares_tokens;

  explicit Division(const GemmQArguments& a) {
    const RowBlocks blocks(a.tiles, a.x.size(1));
    const int64_t head_features = a.weight.size(0) / a.tiles.heads;
    QProblem& p = problem;
    p.cache = bits_of(a.tiles.cache, a.tiles.cache_indptr);
    p.batch = static_cast<int>(a.x.size(0)), p.heads = static_cast<int>(a.tiles.heads);
    p.first_block = blocks.first, p.blocks = blocks.count;
    p.block_q = a.tiles.block_q, p.row_offset = static_cast<int>(a.tiles.row_offset);
    const int groups = static_cast<int>((head_features + kGroupFeatures - 1) / kGroupFeatures);
    // Items of two tiles fill few rounds worse than they save copies.
    constexpr int kFewRounds = 8;
    const int64_t tiles = (blocks.count * a.tiles.block_q + 255) / 256 * p.heads * p.batch * groups;
    sharers = tiles < kFewRounds * multiprocessors(a.x.device.id) ? 1 : kMostSharers;
    shares_tokens = groups > 1 || sharers == 1;
    p.groups = shares_tokens ? (groups + sharers - 1) / sharers : 1;
    p.item_blocks = (shares_tokens ? 256 : sharers * 256) / p.block_q;
    // Bands are longer where the table would be too large.
    const int most_bands = std::max(kMostCounts / p.lists() - 1, 1);
    p.band_blocks = std::max(kBandTokens / p.block_q, (p.blocks + most_bands - 1) / most_bands);
    p.bands = (p.blocks + p.band_blocks - 1) / p.band_blocks;
  }
};

void check_served(const GemmQArguments& a) {
  check_sizes(a.x, "x");
  check_sizes(a.weight, "weight");
  check_size(a.tiles.row_offset, "row_offset");
  const int64_t features = a.weight.size(0) / a.tiles.heads, lists = a.x.size(0) * a.tiles.heads;
  if (features % 8 != 0 && a.tiles.heads > 1)
    throw Error(ErrorKind::kNotImplemented,
                text("weight: expected rows a head that are a multiple of 8 (cuda_sm90), got ",
                     a.weight.size(0), " / ", a.tiles.heads, " = ", features));
  if (lists > kMostLists)
    throw Error(ErrorKind::kNotImplemented,
                text("x: expected batch * heads up to ", kMostLists, " (cuda_sm90), got ", lists));
  const RowBlocks blocks(a.tiles, a.x.size(1));
  if (blocks.count > kMostRowBlocks)
    throw Error(ErrorKind::kNotImplemented,
                text("x: expected up to ", kMostRowBlocks, " row blocks (cuda_sm90), got ", blocks.count));
  const int64_t tiles = lists * blocks.count * ((features + kGroupFeatures - 1) / kGroupFeatures);
  if (tiles > INT32_MAX / 4)
    throw Error(ErrorKind::kNotImplemented, text("out: expected fewer than 2^29 tiles (cuda_sm90), got ", tiles));
}

/// Bytes of all blocks' tables, if they do not lie in shared memory.
int64_t table_bytes(const QProblem& p, int device) {
  const int64_t one = QPlanStorage::needed(p);
  return one <= QPlanStorage::kBytes ? 0 : one * multiprocessors(device);
}

}  // namespace

size_t gemm_q_workspace(const GemmQArguments& a, const Context&) {
  check_served(a);
  return static_cast<size_t>(kWorkspaceAlignment + table_bytes(Division(a).problem, a.x.device.id));
}

void gemm_q(const GemmQArguments& a, const Context& context) {
  check_served(a);
  const int device = a.x.device.id;
  const Division division(a);
  QParameters p{};
  p.problem = division.problem, p.sharers = division.sharers, p.shares_tokens = division.shares_tokens;
  p.x = matrix_map(a.x, p.problem.block_q, "x");
  p.weight = matrix_map(a.weight, 64, "weight");
  p.out = output_of(a.out, a.tiles.heads, p.problem.block_q, "out");
  if (table_bytes(p.problem, device) > 0)
    p.tables = static_cast<unsigned char*>(context.workspace) + kWorkspaceAlignment;
  p.bias = a.bias.present() ? a.bias.data : nullptr;
  p.weight_policy = weight_policy(a.weight);
  p.steps = static_cast<int>((a.weight.size(1) + GemmSizes::kStepK - 1) / GemmSizes::kStepK);
  p.head_features = static_cast<int>(a.weight.size(0) / a.tiles.heads);
  p.activation = a.activation;
  p.counter = zero_counter(context, device);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  if (a.x.dtype == DType::kFloat16)
    launch_gemm<GemmQ<__half>>(p, device, stream);
  else
    launch_gemm<GemmQ<__nv_bfloat16>>(p, device, stream);
}

}  // namespace flashomni::cuda::sm90
