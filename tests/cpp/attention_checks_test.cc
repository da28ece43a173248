// Every argument check of attention.
#include "flashomni/attention.h"
#include "tests/cpp/checks.h"

namespace flashomni {
namespace {

using namespace testing;

class AttentionChecks : public ::testing::Test {
 protected:
  AttentionChecks() {
    Random random(1);
    SymbolGeometry g;
    g.q_tokens = 200, g.kv_tokens = 150, g.heads = 6;
    masks = Masks::random(g, 2, 0.5, 0.5, random);
    a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse, a.symbols = masks.symbols();
    a.k_mean = k_mean, a.v_mean = v_mean, a.kv_block_len = lengths;
  }
  Array q{kHalf, {2, 200, 6, 64}}, k{kHalf, {2, 150, 2, 64}}, v{kHalf, {2, 150, 2, 64}},
      out{kHalf, {2, 200, 6, 64}};
  Array lse{kSingle, {2, 200, 6}}, k_mean{kSingle, {2, 2, 2, 64}}, v_mean{kSingle, {2, 2, 2, 64}};
  Array lengths = Array::ints({128, 22});
  Masks masks;
  AttentionArguments a;
};

TEST_F(AttentionChecks, Batched) {
  using A = AttentionArguments;
  std::vector<Fault<A>> faults;
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"q", [](A& x) -> TensorView& { return x.q; }},
      {"k", [](A& x) -> TensorView& { return x.k; }},
      {"v", [](A& x) -> TensorView& { return x.v; }},
      {"out", [](A& x) -> TensorView& { return x.out; }},
      {"lse", [](A& x) -> TensorView& { return x.lse; }},
      {"symbols.cache", [](A& x) -> TensorView& { return x.symbols.cache; }},
      {"symbols.skip", [](A& x) -> TensorView& { return x.symbols.skip; }},
      {"k_mean", [](A& x) -> TensorView& { return x.k_mean; }},
      {"v_mean", [](A& x) -> TensorView& { return x.v_mean; }},
      {"kv_block_len", [](A& x) -> TensorView& { return x.kv_block_len; }}};
  for (size_t i = 0; i < tensors.size(); ++i) {
    add_tensor_faults<A>(&faults, tensors[i].first, tensors[i].second, i < 4);
    if (i > 0) add_device_fault<A>(&faults, tensors[i].first, tensors[i].second);
  }
  const std::vector<Fault<A>> more = {
      {"q", T, [](A& x) { x.q.device.type = DeviceType::kCUDA, x.q.dtype = kSingle; }},
      {"q", V, [](A& x) { x.q.shape[3] = 65; }},
      {"k", T, [](A& x) { x.k.dtype = DType::kFloat16; }},
      {"k", V, [](A& x) { x.k.shape[0] = 1; }},
      {"k", V, [](A& x) { x.k.shape[2] = x.v.shape[2] = 4; }},
      {"k", V, [](A& x) { x.k.shape[2] = x.v.shape[2] = 0; }},
      {"v", V, [](A& x) { x.v.shape[1] = 149; }},
      {"out", V, [](A& x) { x.out.strides[1] = 0; }},
      {"out", V, [](A& x) { x.out = x.q; }},
      {"out", V, [](A& x) { x.out.data = static_cast<char*>(x.v.data) + 2; }},
      {"lse", V, [](A& x) { x.lse.data = x.out.data; }},
      {"lse", V, [](A& x) { x.lse.shape[2] = 5; }},
      {"symbols.cache", V, [](A& x) { x.symbols.cache.shape[1] -= 1; }},
      {"symbols.cache", V, [](A& x) { x.symbols.cache.shape[0] = 1; }},
      {"symbols.skip", V, [](A& x) { x.symbols.skip.shape[1] -= 1; }},
      {"symbols.cache_indptr", V,
       [](A& x) { x.symbols.cache = {}, x.symbols.cache_indptr = x.kv_block_len; }},
      {"block_q", V, [](A& x) { x.symbols.block_q = 96; }},
      {"block_kv", V, [](A& x) { x.symbols.block_kv = 0; }},
      {"block_kv", V, [](A& x) { x.symbols.block_q = 64; }},
      {"v_mean", T, [](A& x) { x.v_mean = {}; }},
      {"k_mean", T, [](A& x) { x.k_mean = {}; }},
      {"k_mean", V, [](A& x) { x.k_mean.shape[1] = 1; }},
      {"kv_block_len[1]", V,
       [](A& x) {
         static int32_t too_long[] = {128, 23};
         x.kv_block_len.data = too_long;
       }},
      {"kv_block_len[0]", V,
       [](A& x) {
         static int32_t negative[] = {-1, 3};
         x.kv_block_len.data = negative;
       }},
      {"scale", V, [](A& x) { x.scale = std::numeric_limits<float>::infinity(); }},
  };
  faults.insert(faults.end(), more.begin(), more.end());
  expect_faults<A>(a, faults, runner(attention_workspace, attention));
}

TEST_F(AttentionChecks, Ragged) {
  using A = AttentionArguments;
  Array flat_q(kHalf, {400, 6, 64}), flat_k(kHalf, {300, 2, 64}), flat_v(kHalf, {300, 2, 64}),
      flat_out(kHalf, {400, 6, 64});
  Array flat_lse(kSingle, {400, 6});
  const Array q_indptr = Array::ints({0, 200, 400}), kv_indptr = Array::ints({0, 150, 300});
  const int32_t cache = static_cast<int32_t>(masks.geometry.cache_bytes());
  const int32_t skip = static_cast<int32_t>(masks.geometry.skip_bytes());
  const Array cache_indptr = Array::ints({0, cache, 2 * cache}),
              skip_indptr = Array::ints({0, skip, 2 * skip});
  A ragged;
  ragged.q = flat_q, ragged.k = flat_k, ragged.v = flat_v, ragged.out = flat_out, ragged.lse = flat_lse;
  ragged.q_indptr = q_indptr, ragged.kv_indptr = kv_indptr;
  ragged.symbols.cache = make_view(masks.cache_bits.bytes(), DType::kUInt8, {2 * cache});
  ragged.symbols.skip = make_view(masks.skip_bits.bytes(), DType::kUInt8, {2 * skip});
  ragged.symbols.cache_indptr = cache_indptr, ragged.symbols.skip_indptr = skip_indptr;
  static int32_t falling[] = {0, 301, 300}, far[] = {0, 200, 401}, below[] = {-1, 200, 400},
                 uneven[] = {0, 1, 4};
  const TensorView mean = k_mean, block_len = lengths;
  const std::vector<Fault<A>> faults = {
      {"q", V, [](A& x) { x.q.ndim = 2; }},
      {"k", V, [](A& x) { x.k.shape[2] = 72; }},
      {"v", V, [](A& x) { x.v.shape[0] = 299; }},
      {"out", V, [](A& x) { x.out.shape[0] = 399; }},
      {"lse", V, [](A& x) { x.lse.shape[0] = 399; }},
      {"q_indptr", T, [](A& x) { x.q_indptr = {}; }},
      {"kv_indptr", T, [](A& x) { x.kv_indptr = {}; }},
      {"q_indptr", T, [](A& x) { x.q_indptr.dtype = DType::kUInt8; }},
      {"q_indptr", V, [](A& x) { x.q_indptr.shape[0] = 0; }},
      {"q_indptr", V, [](A& x) { x.q_indptr.data = far; }},
      {"q_indptr", V, [](A& x) { x.q_indptr.data = below; }},
      {"kv_indptr", V, [](A& x) { x.kv_indptr.data = falling; }},
      {"kv_indptr", V, [](A& x) { x.kv_indptr.shape[0] = 2; }},
      {"kv_indptr", V, [](A& x) { x.kv_indptr.device = Device{DeviceType::kCUDA, 0}; }},
      {"symbols.cache", V, [](A& x) { x.symbols.cache_indptr.data = uneven; }},
      {"symbols.skip_indptr", V, [](A& x) { x.symbols.skip.shape[0] -= 1; }},
      {"symbols.skip", V, [](A& x) { x.symbols.skip_indptr = {}; }},
      {"k_mean", N, [mean](A& x) { x.k_mean = x.v_mean = mean; }},
      {"kv_block_len", N, [block_len](A& x) { x.kv_block_len = block_len; }},
  };
  expect_faults<A>(ragged, faults, runner(attention_workspace, attention));
}

TEST_F(AttentionChecks, ContextAndBackend) {
  Context context;
  context.threads = -1;
  EXPECT_FAILS(attention_workspace(a, context), kValue, "threads");
  context.threads = 2;
  const size_t bytes = attention_workspace(a, context);
  ASSERT_GT(bytes, 0u);
  EXPECT_FAILS(attention(a, context), kRuntime, "workspace");
  Workspace workspace(bytes + 64);
  context = workspace.context(2);
  context.workspace_bytes = bytes - 1;
  EXPECT_FAILS(attention(a, context), kRuntime, "workspace");
  context.workspace_bytes = bytes;
  context.workspace = static_cast<char*>(context.workspace) + 8;
  EXPECT_FAILS(attention(a, context), kRuntime, "workspace");

  AttentionArguments cuda;
  cuda.q = a.q, cuda.k = a.k, cuda.v = a.v, cuda.out = a.out;
  for (TensorView* view : {&cuda.q, &cuda.k, &cuda.v, &cuda.out}) view->device = Device{DeviceType::kCUDA, 0};
  EXPECT_FAILS(attention_workspace(cuda, Context{}), kNotImplemented, "device");
}

TEST_F(AttentionChecks, NothingIsWrittenBeforeAnError) {
  out.fill([] { return 7.0; });
  const Array before = out;
  a.symbols.skip.shape[1] -= 1;
  Context context;
  EXPECT_FAILS(attention(a, context), kValue, "symbols.skip");
  EXPECT_EQ(out.storage(), before.storage());
}

// q, k and v of one packed projection, and an output that lies beside other columns, share buffers but no
// element.
TEST_F(AttentionChecks, InterleavedViewsAreApart) {
  Random random(2);
  Array packed = Array::random(kHalf, {2, 150, 4, 256}, random);  // [.., heads, (q k v out) of 64]
  const auto part = [&](int64_t which) {
    TensorView view = packed;
    view.shape[3] = 64;
    view.data = static_cast<char*>(view.data) + which * 64 * 2;
    return view;
  };
  AttentionArguments b;
  b.q = part(0), b.k = part(1), b.v = part(2), b.out = part(3);
  EXPECT_NO_THROW(run_operator(attention_workspace, attention, b));
  b.out.data = static_cast<char*>(b.out.data) - 2;
  EXPECT_FAILS(attention_workspace(b, Context{}), kValue, "out");

  // Text rows in, image rows out, of one buffer with a batch of two.
  TensorView whole = packed;
  b.q = whole, b.out = whole;
  b.q.shape = {2, 50, 4, 64}, b.out.shape = {2, 50, 4, 64};
  b.out.data = static_cast<char*>(whole.data) + 50 * 4 * 256 * 2;
  b.k.data = b.v.data = static_cast<char*>(whole.data) + 100 * 4 * 256 * 2;
  b.k.shape[1] = b.v.shape[1] = 50;
  EXPECT_NO_THROW(run_operator(attention_workspace, attention, b));
  b.out.data = static_cast<char*>(whole.data) + 49 * 4 * 256 * 2;
  EXPECT_FAILS(attention_workspace(b, Context{}), kValue, "out");
}

}  // namespace
}  // namespace flashomni
