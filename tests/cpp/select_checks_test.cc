// Every argument check of block means, selection, summaries, norm and RoPE.
#include "flashomni/select.h"
#include "tests/cpp/checks.h"

namespace flashomni {
namespace {

using namespace testing;

TEST(SelectChecks, BlockMean) {
  using A = BlockMeanArguments;
  Array x(kHalf, {2, 200, 3, 64}), out(kSingle, {2, 2, 3, 64}), similarity(kSingle, {2, 2, 3});
  A a;
  a.x = x, a.out = out, a.similarity = similarity;
  std::vector<Fault<A>> faults = {
      {"x", T, [](A& v) { v.x = {}; }},           {"x", T, [](A& v) { v.x.dtype = DType::kInt32; }},
      {"x", V, [](A& v) { v.x.ndim = 3; }},       {"x", V, [](A& v) { v.x.shape[3] = 512; }},
      {"x", V, [](A& v) { v.x.data = nullptr; }}, {"block", V, [](A& v) { v.block = 32; }},
      {"out", V, [](A& v) { v.block = 64; }},     {"out", V, [](A& v) { v.out.data = v.x.data; }},
  };
  add_tensor_faults<A>(&faults, "out", [](A& v) -> TensorView& { return v.out; }, true);
  add_device_fault<A>(&faults, "out", [](A& v) -> TensorView& { return v.out; });
  faults.push_back({"similarity", V, [](A& v) { v.similarity.data = v.out.data; }});
  add_tensor_faults<A>(&faults, "similarity", [](A& v) -> TensorView& { return v.similarity; }, false);
  add_device_fault<A>(&faults, "similarity", [](A& v) -> TensorView& { return v.similarity; });
  expect_faults<A>(a, faults, [](const A& v) { block_mean(v, Context{}); });
  Context context;
  context.threads = -2;
  EXPECT_FAILS(block_mean(a, context), kValue, "threads");
}

TEST(SelectChecks, Selection) {
  using A = SelectArguments;
  Random random(4);
  SymbolGeometry g;
  g.q_tokens = g.kv_tokens = 700, g.heads = 4, g.block_kv = 64;
  Masks masks = Masks::random(g, 2, 1, 1, random);
  Array q_mean = Array::random(kSingle, {2, 6, 4, 64}, random),
        k_mean = Array::random(kSingle, {2, 11, 2, 64}, random);
  A a;
  a.q_mean = q_mean, a.k_mean = k_mean, a.symbols = masks.symbols(), a.tokens = 700, a.text_length = 77;
  Array similarity = Array::random(kSingle, {2, 11, 2}, random);
  a.k_similarity = similarity;
  std::vector<Fault<A>> faults = {
      {"q_mean", V, [](A& v) { v.tokens = 900; }},
      {"k_mean", V, [](A& v) { v.k_mean.shape[1] = 10; }},
      {"k_mean", V, [](A& v) { v.k_mean.shape[2] = 3; }},
      {"tokens", V, [](A& v) { v.tokens = 0; }},
      {"text_start", V, [](A& v) { v.text_start = -1; }},
      {"text_length", V, [](A& v) { v.text_length = -1; }},
      {"text_length", V, [](A& v) { v.text_start = 624; }},
      {"tau_q", V, [](A& v) { v.tau_q = 1.01f; }},
      {"tau_q", V, [](A& v) { v.tau_q = std::numeric_limits<float>::quiet_NaN(); }},
      {"tau_kv", V, [](A& v) { v.tau_kv = -0.1f; }},
      {"s_q", V, [](A& v) { v.s_q = 2; }},
      {"self_similarity", V, [](A& v) { v.self_similarity = -1; }},
      {"k_similarity", V, [](A& v) { v.k_similarity.shape[2] = 4; }},
      {"scale", V, [](A& v) { v.scale = std::numeric_limits<float>::quiet_NaN(); }},
      {"block_q", V, [](A& v) { v.symbols.block_q = 7; }},
      {"block_kv", V, [](A& v) { v.symbols.block_q = 64, v.symbols.block_kv = 128; }},
      {"symbols.cache", V, [](A& v) { v.symbols.cache.shape[1] -= 1; }},
      {"symbols.skip", V, [](A& v) { v.symbols.skip.shape[0] = 1; }},
      {"symbols.cache", V, [](A& v) { v.symbols.cache.strides[0] = 0; }},
      {"symbols.cache", V, [](A& v) { v.symbols.cache.data = v.symbols.skip.data; }},
      {"symbols.skip", V, [](A& v) { v.symbols.skip.data = v.k_mean.data; }},
      {"symbols.skip_indptr", N,
       [](A& v) {
         static int32_t ends[] = {0, 1, 2};
         v.symbols.skip_indptr = make_view(ends, DType::kInt32, {3});
       }},
  };
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"k_mean", [](A& v) -> TensorView& { return v.k_mean; }},
      {"symbols.cache", [](A& v) -> TensorView& { return v.symbols.cache; }},
      {"symbols.skip", [](A& v) -> TensorView& { return v.symbols.skip; }}};
  for (const auto& tensor : tensors) {
    add_tensor_faults<A>(&faults, tensor.first, tensor.second, true);
    add_device_fault<A>(&faults, tensor.first, tensor.second);
  }
  add_tensor_faults<A>(&faults, "q_mean", [](A& v) -> TensorView& { return v.q_mean; }, true);
  expect_faults<A>(a, faults, runner(select_flashomni_workspace, select_flashomni));
  EXPECT_FAILS(select_flashomni(a, Context{}), kRuntime, "workspace");
}

TEST(SelectChecks, Summary) {
  using A = SummarizeArguments;
  Random random(6);
  SymbolGeometry g;
  g.q_tokens = 1300, g.kv_tokens = 300, g.heads = 4, g.block_kv = 64;
  Masks masks = Masks::random(g, 2, 1, 1, random);
  Array rows(DType::kUInt8, {2, 2}), shares(kSingle, {2, 4}), awake(DType::kUInt8, {2});
  A a;
  a.symbols = masks.symbols(), a.heads = 4, a.q_tokens = 1300, a.kv_tokens = 300;
  a.rows = rows, a.shares = shares, a.awake = awake;
  static int32_t ends[] = {0, 1, 2};
  std::vector<Fault<A>> faults = {
      {"heads", V, [](A& v) { v.heads = 0; }},
      {"q_tokens", V, [](A& v) { v.q_tokens = 0; }},
      {"kv_tokens", V, [](A& v) { v.kv_tokens = -1; }},
      {"symbols.cache", V, [](A& v) { v.q_tokens = 1100; }},
      {"symbols.skip", V, [](A& v) { v.kv_tokens = 500; }},
      {"block_q", V, [](A& v) { v.symbols.block_q = 32; }},
      {"batch of symbols.cache", V, [](A& v) { v.symbols.cache.shape[0] = 0; }},
      {"symbols.skip", V, [](A& v) { v.symbols.skip.shape[0] = 1; }},
      {"symbols.cache_indptr", N, [](A& v) { v.symbols.cache_indptr = make_view(ends, DType::kInt32, {3}); }},
      {"symbols.skip_indptr", N, [](A& v) { v.symbols.skip_indptr = make_view(ends, DType::kInt32, {3}); }},
      {"rows", V, [](A& v) { v.rows.shape[0] = 3; }},
      {"rows", V, [](A& v) { v.rows.strides[0] = 0; }},
      {"shares", V, [](A& v) { v.shares.shape[0] = 1; }},
      {"rows", V, [](A& v) { v.rows.data = v.symbols.skip.data; }},
      {"rows", V, [](A& v) { v.awake.data = v.rows.data; }},
      {"shares", V, [](A& v) { v.shares.data = v.symbols.cache.data; }},
      {"awake", V, [](A& v) { v.awake.data = v.symbols.cache.data; }},
  };
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"symbols.cache", [](A& v) -> TensorView& { return v.symbols.cache; }},
      {"symbols.skip", [](A& v) -> TensorView& { return v.symbols.skip; }},
      {"rows", [](A& v) -> TensorView& { return v.rows; }},
      {"shares", [](A& v) -> TensorView& { return v.shares; }},
      {"awake", [](A& v) -> TensorView& { return v.awake; }}};
  for (size_t i = 0; i < tensors.size(); ++i) {
    add_tensor_faults<A>(&faults, tensors[i].first, tensors[i].second, true);
    if (i > 0) add_device_fault<A>(&faults, tensors[i].first, tensors[i].second);
  }
  expect_faults<A>(a, faults, [](const A& v) { summarize_symbols(v, Context{}); });
  Context context;
  context.threads = -1;
  EXPECT_FAILS(summarize_symbols(a, context), kValue, "threads");
}

TEST(SelectChecks, NormRope) {
  using A = NormRopeArguments;
  Random random(5);
  SymbolGeometry g;
  g.q_tokens = 300, g.kv_tokens = 1, g.heads = 3;
  const Masks masks = Masks::random(g, 2, 1, 1, random);
  Array x(kHalf, {2, 200, 3, 64}), weight(kHalf, {64}), cosine(kSingle, {300, 64}), sine(kSingle, {300, 64});
  A a;
  a.x = x, a.weight = weight, a.cos = cosine, a.sin = sine, a.cache = masks.cache_bits;
  a.tokens = 300, a.row_offset = 77;
  Array keys(kHalf, {2, 200, 2, 64}), wide(kHalf, {128});
  a.keys = keys, a.keys_weight = wide;
  std::vector<Fault<A>> faults = {
      {"x", T, [](A& v) { v.x = {}; }},
      {"x", T, [](A& v) { v.x.dtype = DType::kUInt8; }},
      {"weight", V, [](A& v) { v.weight = v.keys_weight; }},
      {"keys", T, [](A& v) { v.keys = {}; }},
      {"keys", V, [](A& v) { v.keys.shape[0] = 1; }},
      {"keys", V, [](A& v) { v.keys.shape[1] = 199; }},
      {"heads of keys", V, [](A& v) { v.keys.shape[2] = 0; }},
      {"keys", V, [](A& v) { v.keys.strides[2] = 0; }},
      {"keys", V, [](A& v) { v.cos.data = v.keys.data; }},
      {"keys", V, [](A& v) { v.weight.data = v.keys.data; }},
      {"x", V, [](A& v) { v.x.data = v.keys.data; }},
      {"x", V, [](A& v) { v.x.data = v.keys_weight.data; }},
      {"keys_weight", V, [](A& v) { v.keys.shape[2] = 1; }},
      {"x", V, [](A& v) { v.x.shape[3] = 60; }},
      {"x", V, [](A& v) { v.x.strides[1] = 0; }},
      {"x", V, [](A& v) { v.x.data = v.cos.data; }},
      {"cos", T, [](A& v) { v.cos = {}; }},
      {"sin", T, [](A& v) { v.sin = {}; }},
      {"cos", V, [](A& v) { v.tokens = 299; }},
      {"row_offset", V, [](A& v) { v.row_offset = 101; }},
      {"row_offset", V, [](A& v) { v.row_offset = -1; }},
      {"row_offset", V, [](A& v) { v.cos = v.sin = {}, v.row_offset = 101; }},
      {"block_q", V, [](A& v) { v.block_q = 1; }},
      {"eps", V, [](A& v) { v.eps = -1; }},
      {"symbols.cache", V, [](A& v) { v.cache.shape[1] += 1; }},
      {"symbols.cache", V, [](A& v) { v.cache.shape[0] = 1; }},
  };
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"weight", [](A& v) -> TensorView& { return v.weight; }},
      {"keys", [](A& v) -> TensorView& { return v.keys; }},
      {"keys_weight", [](A& v) -> TensorView& { return v.keys_weight; }},
      {"cos", [](A& v) -> TensorView& { return v.cos; }},
      {"sin", [](A& v) -> TensorView& { return v.sin; }},
      {"symbols.cache", [](A& v) -> TensorView& { return v.cache; }}};
  for (const auto& tensor : tensors) {
    add_tensor_faults<A>(&faults, tensor.first, tensor.second, false);
    add_device_fault<A>(&faults, tensor.first, tensor.second);
  }
  expect_faults<A>(a, faults, [](const A& v) { norm_rope(v, Context{}); });
}

TEST(SelectChecks, NormRopeMean) {
  using A = NormRopeMeanArguments;
  Array x(kHalf, {2, 200, 3, 64}), weight(kHalf, {64}), table(kSingle, {300, 64}),
      bits(DType::kUInt8, {2, 2});
  Array mean(kSingle, {2, 4, 3, 64}), similarity(kSingle, {2, 4, 3}), wide(kHalf, {192});
  A a;
  a.rows.x = x, a.rows.weight = weight, a.rows.cos = a.rows.sin = table;
  a.rows.tokens = 300, a.rows.row_offset = 77, a.block = 64, a.mean = mean, a.similarity = similarity;
  std::vector<Fault<A>> faults = {
      {"x", T, [](A& v) { v.rows.x = {}; }},
      {"row_offset", V, [](A& v) { v.rows.row_offset = 101; }},
      {"eps", V, [](A& v) { v.rows.eps = -1; }},
      {"block", V, [](A& v) { v.block = 100; }},
      {"mean", V, [](A& v) { v.block = 128; }},
      {"mean", V, [](A& v) { v.mean.data = v.rows.x.data; }},
      {"mean", V, [](A& v) { v.mean.data = v.rows.cos.data; }},
      {"similarity", V, [](A& v) { v.similarity.data = v.rows.sin.data; }},
      {"symbols.cache", V, [&](A& v) { v.rows.cache = bits; }},
      {"keys", V, [](A& v) { v.rows.keys = v.rows.x; }},
      {"weight", N, [&](A& v) { v.rows.weight = wide; }},
  };
  const auto mean_of = [](A& v) -> TensorView& { return v.mean; };
  const auto similarity_of = [](A& v) -> TensorView& { return v.similarity; };
  add_tensor_faults<A>(&faults, "mean", mean_of, true);
  add_device_fault<A>(&faults, "mean", mean_of);
  add_tensor_faults<A>(&faults, "similarity", similarity_of, false);
  add_device_fault<A>(&faults, "similarity", similarity_of);
  expect_faults<A>(a, faults, [](const A& v) { norm_rope_mean(v, Context{}); });
}

}  // namespace
}  // namespace flashomni
