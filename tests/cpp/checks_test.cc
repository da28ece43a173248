// Every argument check of every operator: the right kind of error, and a message that names the argument.
#include <functional>

#include "flashomni/attention.h"
#include "flashomni/forecast.h"
#include "flashomni/gemm.h"
#include "flashomni/select.h"
#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::Array;
using testing::Masks;
using testing::Random;

constexpr DType kHalf = DType::kBFloat16, kSingle = DType::kFloat32;
constexpr auto V = ErrorKind::kValue, T = ErrorKind::kType, N = ErrorKind::kNotImplemented;

/// One way to spoil arguments that were good.
template <class Arguments>
struct Fault {
  const char* argument;
  ErrorKind kind;
  std::function<void(Arguments&)> spoil;
};

template <class Arguments>
void expect_faults(const Arguments& good, const std::vector<Fault<Arguments>>& faults,
                   const std::function<void(const Arguments&)>& run) {
  ASSERT_NO_THROW(run(good));
  for (size_t i = 0; i < faults.size(); ++i) {
    SCOPED_TRACE(text("fault ", i, ": ", faults[i].argument));
    Arguments bad = good;
    faults[i].spoil(bad);
    try {
      run(bad);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), faults[i].kind) << error.what();
      EXPECT_EQ(std::string(error.what()).rfind(std::string(faults[i].argument) + ": expected ", 0), 0u)
          << error.what();
    }
  }
}

/// Faults that every tensor argument shares.
template <class Arguments>
void add_tensor_faults(std::vector<Fault<Arguments>>* faults, const char* name,
                       std::function<TensorView&(Arguments&)> of, bool required, ErrorKind missing = T) {
  const auto add = [&](ErrorKind kind, std::function<void(TensorView&)> spoil) {
    faults->push_back({name, kind, [of, spoil](Arguments& a) { spoil(of(a)); }});
  };
  if (required) add(missing, [](TensorView& v) { v = TensorView{}; });
  add(T, [](TensorView& v) { v.dtype = v.dtype == DType::kInt32 ? DType::kUInt8 : DType::kInt32; });
  add(V, [](TensorView& v) { v.data = nullptr; });
  add(V, [](TensorView& v) { v.strides[v.ndim - 1] = 2; });
  add(V, [](TensorView& v) { v.shape[v.ndim - 1] += 1; });
  add(V, [](TensorView& v) { v.ndim -= 1; });
}

template <class Arguments>
void add_device_fault(std::vector<Fault<Arguments>>* faults, const char* name,
                      std::function<TensorView&(Arguments&)> of) {
  faults->push_back({name, V, [of](Arguments& a) { of(a).device = Device{DeviceType::kCUDA, 0}; }});
}

template <class Arguments>
std::function<void(const Arguments&)> runner(size_t (*bytes)(const Arguments&, const Context&),
                                             void (*op)(const Arguments&, const Context&)) {
  return [=](const Arguments& a) { testing::run_operator(bytes, op, a); };
}

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
  testing::Workspace workspace(bytes + 64);
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
  EXPECT_NO_THROW(testing::run_operator(attention_workspace, attention, b));
  b.out.data = static_cast<char*>(b.out.data) - 2;
  EXPECT_FAILS(attention_workspace(b, Context{}), kValue, "out");

  // Text rows in, image rows out, of one buffer with a batch of two.
  TensorView whole = packed;
  b.q = whole, b.out = whole;
  b.q.shape = {2, 50, 4, 64}, b.out.shape = {2, 50, 4, 64};
  b.out.data = static_cast<char*>(whole.data) + 50 * 4 * 256 * 2;
  b.k.data = b.v.data = static_cast<char*>(whole.data) + 100 * 4 * 256 * 2;
  b.k.shape[1] = b.v.shape[1] = 50;
  EXPECT_NO_THROW(testing::run_operator(attention_workspace, attention, b));
  b.out.data = static_cast<char*>(whole.data) + 49 * 4 * 256 * 2;
  EXPECT_FAILS(attention_workspace(b, Context{}), kValue, "out");
}

class GemmChecks : public ::testing::Test {
 protected:
  GemmChecks() {
    Random random(3);
    SymbolGeometry g;
    g.q_tokens = 300, g.kv_tokens = 1, g.heads = 2;
    masks = Masks::random(g, 2, 0.5, 1, random);
    tiles.cache = masks.cache_bits, tiles.heads = 2, tiles.tokens = 300, tiles.row_offset = 77;
  }
  Masks masks;
  TileSymbols tiles;
  Array x{kHalf, {2, 200, 160}}, weight{kHalf, {96, 160}}, bias{kHalf, {96}}, out{kHalf, {2, 200, 96}};
  Array other{kHalf, {2, 200, 136}}, cached0{kHalf, {2, 200, 96}}, cached1{kHalf, {2, 200, 96}};
  Array coefficients{kSingle, {2}};
};

template <class A>
std::vector<Fault<A>> tile_faults() {
  static int32_t ends[] = {0, 1, 2};
  return {
      {"heads", V, [](A& a) { a.tiles.heads = 0; }},
      {"block_q", V, [](A& a) { a.tiles.block_q = 100; }},
      {"row_offset", V, [](A& a) { a.tiles.row_offset = -1; }},
      {"row_offset", V, [](A& a) { a.tiles.row_offset = 101; }},
      {"tokens", V, [](A& a) { a.tiles.tokens = -1; }},
      {"row_offset", V, [](A& a) { a.tiles.tokens = 0; }},
      {"symbols.cache", V, [](A& a) { a.tiles.tokens = 4000; }},
      {"symbols.cache", V, [](A& a) { a.tiles.cache.shape[1] -= 1; }},
      {"symbols.cache", V, [](A& a) { a.tiles.cache.shape[0] = 1; }},
      {"symbols.cache", T, [](A& a) { a.tiles.cache.dtype = DType::kInt32; }},
      {"symbols.cache_indptr", V,
       [](A& a) {
         a.tiles.cache.ndim = 1;
         a.tiles.cache_indptr = make_view(ends, DType::kInt32, {2});
       }},
      {"symbols.cache_indptr", V,
       [](A& a) {
         a.tiles.cache = {};
         a.tiles.cache_indptr = make_view(ends, DType::kInt32, {3});
       }},
  };
}

TEST_F(GemmChecks, Query) {
  using A = GemmQArguments;
  A a;
  a.x = x, a.weight = weight, a.bias = bias, a.out = out, a.tiles = tiles;
  std::vector<Fault<A>> faults = tile_faults<A>();
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"x", [](A& v) -> TensorView& { return v.x; }},
      {"weight", [](A& v) -> TensorView& { return v.weight; }},
      {"bias", [](A& v) -> TensorView& { return v.bias; }},
      {"out", [](A& v) -> TensorView& { return v.out; }}};
  for (size_t i = 1; i < tensors.size(); ++i) {
    add_tensor_faults<A>(&faults, tensors[i].first, tensors[i].second, i != 2);
    add_device_fault<A>(&faults, tensors[i].first, tensors[i].second);
  }
  const std::vector<Fault<A>> more = {
      {"x", T, [](A& v) { v.x = {}; }},
      {"x", T, [](A& v) { v.x.dtype = DType::kUInt8; }},
      {"x", V, [](A& v) { v.x.data = nullptr; }},
      {"x", V, [](A& v) { v.x.ndim = 2; }},
      {"x", V, [](A& v) { v.x.strides[2] = 3; }},
      {"weight", V, [](A& v) { v.x.shape[2] = 159; }},
      {"weight", T, [](A& v) { v.weight.dtype = DType::kFloat16; }},
      {"weight", V, [](A& v) { v.weight.shape[0] = 95, v.bias.shape[0] = 95, v.out.shape[2] = 95; }},
      {"rows of weight", V, [](A& v) { v.weight.shape[0] = 0; }},
      {"columns of weight", V, [](A& v) { v.weight.shape[1] = v.x.shape[2] = 0; }},
      {"out", V, [](A& v) { v.out.strides[0] = 0; }},
      {"out", V, [](A& v) { v.out.data = static_cast<char*>(v.x.data) + 64; }},
      {"out", V, [](A& v) { v.out.data = v.weight.data; }},
      {"activation", V, [](A& v) { v.activation = static_cast<Activation>(3); }},
  };
  faults.insert(faults.end(), more.begin(), more.end());
  expect_faults<A>(a, faults, runner(gemm_q_workspace, gemm_q));
  a.tiles.cache = {}, a.tiles.tokens = 0;  // without symbols the joint sequence needs no length
  EXPECT_NO_THROW(testing::run_operator(gemm_q_workspace, gemm_q, a));
  EXPECT_FAILS(gemm_q(a, Context{}), kRuntime, "workspace");
}

TEST_F(GemmChecks, OutputUpdate) {
  using A = GemmOUpdateArguments;
  A a;
  a.orders = 2, a.o[0] = x, a.o[1] = other, a.cached[0] = cached0, a.cached[1] = cached1;
  a.weight = weight, a.bias = bias, a.out = out, a.head_dim = 64, a.tiles = tiles;
  std::vector<Fault<A>> faults = tile_faults<A>();
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"weight", [](A& v) -> TensorView& { return v.weight; }},
      {"out", [](A& v) -> TensorView& { return v.out; }},
      {"cached[0]", [](A& v) -> TensorView& { return v.cached[0]; }},
      {"cached[1]", [](A& v) -> TensorView& { return v.cached[1]; }}};
  for (const auto& tensor : tensors) {
    add_tensor_faults<A>(&faults, tensor.first, tensor.second, true);
    add_device_fault<A>(&faults, tensor.first, tensor.second);
  }
  const std::vector<Fault<A>> more = {
      {"orders", V, [](A& v) { v.orders = 0; }},
      {"orders", V, [](A& v) { v.orders = kMaxOrder + 2; }},
      {"cached[2]", T, [this](A& v) { v.orders = 3, v.o[2] = other; }},
      {"o[2]", T, [](A& v) { v.orders = 3; }},
      {"o[0]", T, [](A& v) { v.o[0] = {}; }},
      {"o[0]", V, [](A& v) { v.o[0].ndim = 2; }},
      {"o[0]", V, [](A& v) { v.head_dim = 88; }},
      {"o[1]", V, [](A& v) { v.head_dim = 72; }},
      {"o[1]", T, [](A& v) { v.o[1].dtype = DType::kFloat16; }},
      {"o[1]", V, [](A& v) { v.o[1].shape[1] = 199; }},
      {"o[1]", V, [](A& v) { v.o[1].data = nullptr; }},
      {"head_dim", V, [](A& v) { v.head_dim = 0; }},
      {"head_dim", V, [](A& v) { v.head_dim = 63; }},
      {"cached[0]", V, [](A& v) { v.out = v.cached[0]; }},
      {"cached[1]", V, [](A& v) { v.cached[1] = v.cached[0]; }},
      {"cached[0]", V, [](A& v) { v.cached[0].data = v.o[1].data; }},
      {"cached[0]", V, [](A& v) { v.cached[0].strides[1] = 0; }},
      {"past", T, [this](A& v) { v.past = x, v.past.dtype = DType::kFloat16; }},
      {"past", V, [this](A& v) { v.past = x, v.past.shape[1] = 199; }},
      {"weight", V, [this](A& v) { v.past = x; }},
      {"o[0]", V, [this](A& v) { v.past = x, v.past.shape[2] = 0; }},
  };
  faults.insert(faults.end(), more.begin(), more.end());
  expect_faults<A>(a, faults, runner(gemm_o_update_workspace, gemm_o_update));
  EXPECT_FAILS(gemm_o_update(a, Context{}), kRuntime, "workspace");
}

TEST_F(GemmChecks, OutputDispatch) {
  using A = GemmODispatchArguments;
  A a;
  a.orders = 2, a.o = x, a.cached[0] = cached0, a.cached[1] = cached1, a.weight = weight;
  a.coefficients = coefficients, a.out = out, a.head_dim = 64, a.tiles = tiles;
  std::vector<Fault<A>> faults = tile_faults<A>();
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"weight", [](A& v) -> TensorView& { return v.weight; }},
      {"out", [](A& v) -> TensorView& { return v.out; }},
      {"coefficients", [](A& v) -> TensorView& { return v.coefficients; }},
      {"cached[0]", [](A& v) -> TensorView& { return v.cached[0]; }},
      {"cached[1]", [](A& v) -> TensorView& { return v.cached[1]; }}};
  for (const auto& tensor : tensors) {
    add_tensor_faults<A>(&faults, tensor.first, tensor.second, true);
    add_device_fault<A>(&faults, tensor.first, tensor.second);
  }
  const std::vector<Fault<A>> more = {
      {"orders", V, [](A& v) { v.orders = 0; }},       {"orders", V, [](A& v) { v.orders = kMaxOrder + 2; }},
      {"coefficients", V, [](A& v) { v.orders = 1; }}, {"o", T, [](A& v) { v.o = {}; }},
      {"o", V, [](A& v) { v.head_dim = 88; }},         {"head_dim", V, [](A& v) { v.head_dim = -8; }},
      {"out", V, [](A& v) { v.out = v.cached[1]; }},   {"out", V, [](A& v) { v.out.data = v.o.data; }},
  };
  faults.insert(faults.end(), more.begin(), more.end());
  expect_faults<A>(a, faults, runner(gemm_o_dispatch_workspace, gemm_o_dispatch));
  EXPECT_FAILS(gemm_o_dispatch(a, Context{}), kRuntime, "workspace");
}

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
  std::vector<Fault<A>> faults = {
      {"x", T, [](A& v) { v.x = {}; }},
      {"x", T, [](A& v) { v.x.dtype = DType::kUInt8; }},
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
  Array mean(kSingle, {2, 4, 3, 64}), similarity(kSingle, {2, 4, 3});
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
  };
  const auto mean_of = [](A& v) -> TensorView& { return v.mean; };
  const auto similarity_of = [](A& v) -> TensorView& { return v.similarity; };
  add_tensor_faults<A>(&faults, "mean", mean_of, true);
  add_device_fault<A>(&faults, "mean", mean_of);
  add_tensor_faults<A>(&faults, "similarity", similarity_of, false);
  add_device_fault<A>(&faults, "similarity", similarity_of);
  expect_faults<A>(a, faults, [](const A& v) { norm_rope_mean(v, Context{}); });
}

TEST(ForecastChecks, Update) {
  using A = TaylorUpdateArguments;
  Array feature(kHalf, {2, 40, 96}), first(kHalf, {2, 40, 96}), second(kHalf, {2, 40, 96});
  A a;
  a.feature = feature, a.orders = 2, a.derivatives[0] = first, a.derivatives[1] = second, a.valid = 1,
  a.gap = 5;
  std::vector<Fault<A>> faults = {
      {"orders", V, [](A& v) { v.orders = 0; }},
      {"orders", V, [](A& v) { v.orders = kMaxOrder + 2; }},
      {"derivatives[2]", T, [](A& v) { v.orders = 3; }},
      {"feature", T, [](A& v) { v.feature = {}; }},
      {"feature", T, [](A& v) { v.feature.dtype = DType::kInt32; }},
      {"feature", V, [](A& v) { v.feature.strides[2] = 2; }},
      {"feature", V, [](A& v) { v.feature.data = nullptr; }},
      {"feature", V, [](A& v) { v.feature.ndim = 0; }},
      {"derivatives[0]", V, [](A& v) { v.derivatives[0] = v.feature; }},
      {"derivatives[1]", V, [](A& v) { v.derivatives[1] = v.derivatives[0]; }},
      {"derivatives[1]", V, [](A& v) { v.derivatives[1].strides[0] = 0; }},
      {"valid", V, [](A& v) { v.valid = 2; }},
      {"valid", V, [](A& v) { v.valid = -1; }},
      {"gap", V, [](A& v) { v.gap = 0; }},
  };
  for (int i = 0; i < 2; ++i) {
    const char* name = i == 0 ? "derivatives[0]" : "derivatives[1]";
    add_tensor_faults<A>(&faults, name, [i](A& v) -> TensorView& { return v.derivatives[i]; }, true);
    add_device_fault<A>(&faults, name, [i](A& v) -> TensorView& { return v.derivatives[i]; });
  }
  expect_faults<A>(a, faults, [](const A& v) { taylor_update(v, Context{}); });
  a.valid = 0, a.gap = 0;  // the first Update has no gap
  EXPECT_NO_THROW(taylor_update(a, Context{}));
}

TEST(ForecastChecks, Forecast) {
  using A = TaylorForecastArguments;
  Array first(kHalf, {40, 96}), second(kHalf, {40, 96}), out(kHalf, {40, 96}), coefficients(kSingle, {2});
  A a;
  a.orders = 2, a.derivatives[0] = first, a.derivatives[1] = second, a.coefficients = coefficients,
  a.out = out;
  std::vector<Fault<A>> faults = {
      {"orders", V, [](A& v) { v.orders = 5; }},
      {"derivatives[0]", T, [](A& v) { v.derivatives[0] = {}; }},
      {"derivatives[0]", T, [](A& v) { v.derivatives[0].dtype = DType::kUInt8; }},
      {"derivatives[1]", V, [](A& v) { v.derivatives[1].shape[0] = 39; }},
      {"coefficients", V, [](A& v) { v.orders = 1; }},
      {"out", V, [](A& v) { v.out = v.derivatives[1]; }},
  };
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"out", [](A& v) -> TensorView& { return v.out; }},
      {"coefficients", [](A& v) -> TensorView& { return v.coefficients; }},
      {"derivatives[1]", [](A& v) -> TensorView& { return v.derivatives[1]; }}};
  for (const auto& tensor : tensors) {
    add_tensor_faults<A>(&faults, tensor.first, tensor.second, true);
    add_device_fault<A>(&faults, tensor.first, tensor.second);
  }
  expect_faults<A>(a, faults, [](const A& v) { taylor_forecast(v, Context{}); });
}

TEST(ForecastChecks, ForecastOfQuantised) {
  using A = TaylorForecastArguments;
  Array first(DType::kUInt8, {40, 200}), second(DType::kUInt8, {40, 200}), out(kHalf, {40, 200}),
      coefficients(kSingle, {2}), scales(kSingle, {40, 2}), more(kSingle, {40, 2});
  A a;
  a.orders = 2, a.derivatives[0] = first, a.derivatives[1] = second, a.coefficients = coefficients,
  a.scales[0] = scales, a.scales[1] = more, a.out = out;
  std::vector<Fault<A>> faults = {
      {"derivatives[0]", T, [](A& v) { v.scales[0] = {}; }},
      {"derivatives[0]", T, [](A& v) { v.derivatives[0] = v.out; }},
      {"derivatives[1]", T, [](A& v) { v.derivatives[1] = v.out; }},
      {"out", T, [](A& v) { v.out.dtype = DType::kInt32; }},
      {"out", V, [](A& v) { v.out.shape[0] = 39; }},
      {"scales[0]", V, [](A& v) { v.scales[0].shape[1] = 1; }},
      {"out", V, [](A& v) { v.scales[1].data = v.out.data; }},
  };
  const auto scales_of = [](A& v) -> TensorView& { return v.scales[1]; };
  add_tensor_faults<A>(&faults, "scales[1]", scales_of, true);
  add_device_fault<A>(&faults, "scales[1]", scales_of);
  expect_faults<A>(a, faults, [](const A& v) { taylor_forecast(v, Context{}); });
}

TEST(ForecastChecks, Quantize) {
  using A = QuantizeArguments;
  Array x(kHalf, {40, 200}), values(DType::kUInt8, {40, 200}), scales(kSingle, {40, 2});
  A a;
  a.x = x, a.values = values, a.scales = scales;
  std::vector<Fault<A>> faults = {
      {"x", T, [](A& v) { v.x = {}; }},
      {"x", V, [](A& v) { v.x.ndim = 0; }},
      {"values", V, [](A& v) { v.values.data = v.x.data; }},
      {"scales", V, [](A& v) { v.scales.data = v.values.data; }},
      {"scales", V, [](A& v) { v.scales.strides[0] = 0; }},
  };
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"values", [](A& v) -> TensorView& { return v.values; }},
      {"scales", [](A& v) -> TensorView& { return v.scales; }}};
  for (const auto& tensor : tensors) {
    add_tensor_faults<A>(&faults, tensor.first, tensor.second, true);
    add_device_fault<A>(&faults, tensor.first, tensor.second);
  }
  expect_faults<A>(a, faults, [](const A& v) { quantize_fp8(v, Context{}); });
}

}  // namespace
}  // namespace flashomni
