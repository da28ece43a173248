// Block-sparse attention from C++: a mask becomes symbols, attention obeys them, one row is checked by hand.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "flashomni/attention.h"
#include "flashomni/error.h"

namespace fo = flashomni;

namespace {

constexpr int64_t kTokens = 1000, kHeads = 4, kDim = 64;

std::vector<float> random_tensor(std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(kTokens * kHeads * kDim);
  for (float& value : values) value = normal(random);
  return values;
}

fo::TensorView view_of(std::vector<float>& values) {
  return fo::make_view(values.data(), fo::DType::kFloat32, {1, kTokens, kHeads, kDim});
}

}  // namespace

int main() try {
  std::mt19937 random(0);
  std::vector<float> q = random_tensor(random), k = random_tensor(random), v = random_tensor(random);
  std::vector<float> out(q.size(), 0.0f);

  // Each query block sees itself and its neighbours; block 3 of head 0 is cached, so its rows stay as they
  // are.
  fo::SymbolGeometry geometry;
  geometry.q_tokens = geometry.kv_tokens = kTokens;
  geometry.heads = kHeads;
  geometry.block_q = 128;
  geometry.block_kv = 64;
  std::vector<uint8_t> cache_mask(geometry.cache_bits(), 1), skip_mask(geometry.skip_bits(), 0);
  cache_mask[3 * kHeads + 0] = 0;
  for (int64_t i = 0; i < geometry.q_blocks(); ++i) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t j = 0; j < geometry.kv_blocks(); ++j) {
        skip_mask[(i * kHeads + h) * geometry.kv_blocks() + j] = std::abs(j / 2 - i) <= 1;
      }
    }
  }
  std::vector<uint8_t> cache(geometry.cache_bytes()), skip(geometry.skip_bytes());
  fo::pack_bits(cache_mask.data(), geometry.cache_bits(), fo::BitOrder::kLittle, cache.data());
  fo::pack_bits(skip_mask.data(), geometry.skip_bits(), fo::BitOrder::kLittle, skip.data());

  fo::AttentionArguments arguments;
  arguments.q = view_of(q), arguments.k = view_of(k), arguments.v = view_of(v), arguments.out = view_of(out);
  arguments.symbols.cache = fo::make_view(cache.data(), fo::DType::kUInt8, {1, geometry.cache_bytes()});
  arguments.symbols.skip = fo::make_view(skip.data(), fo::DType::kUInt8, {1, geometry.skip_bytes()});
  arguments.symbols.block_q = geometry.block_q;
  arguments.symbols.block_kv = geometry.block_kv;

  // Operators never allocate: they ask for a workspace, 64-byte aligned.
  fo::Context context;
  context.workspace_bytes = (fo::attention_workspace(arguments, context) + 63) / 64 * 64;
  context.workspace = std::aligned_alloc(64, std::max<size_t>(64, context.workspace_bytes));
  fo::attention(arguments, context);
  std::free(context.workspace);

  // Row 500 of head 2 by the definition of softmax.
  const int64_t row = 500, head = 2, block = row / geometry.block_q;
  const auto at = [&](int64_t token) { return (token * kHeads + head) * kDim; };
  double total = 0, sum[kDim] = {};
  for (int64_t t = 0; t < kTokens; ++t) {
    if (std::abs(t / geometry.block_q - block) > 1) continue;
    double dot = 0;
    for (int64_t d = 0; d < kDim; ++d) dot += q[at(row) + d] * static_cast<double>(k[at(t) + d]);
    const double weight = std::exp(dot / std::sqrt(static_cast<double>(kDim)));
    total += weight;
    for (int64_t d = 0; d < kDim; ++d) sum[d] += weight * v[at(t) + d];
  }
  double worst = 0;
  for (int64_t d = 0; d < kDim; ++d) worst = std::max(worst, std::fabs(out[at(row) + d] - sum[d] / total));

  const float cached = out[(3 * 128 * kHeads + 0) * kDim];
  const int64_t selected = fo::BitRow(skip.data(), 0, geometry.skip_bits()).count();
  std::printf("instruction set        %s\n", fo::cpu_isa());
  std::printf("selected block pairs   %lld of %lld\n", static_cast<long long>(selected),
              static_cast<long long>(geometry.skip_bits()));
  std::printf("row 500, head 2        differs from the naive sum by at most %.1e\n", worst);
  std::printf("a cached tile's row    %g, as it was\n", cached);
  return worst < 1e-5 && cached == 0.0f ? 0 : 1;
} catch (const fo::Error& error) {
  std::fprintf(stderr, "%s: %s\n", error.kind_name(), error.what());
  return 1;
}
