// Every argument check of GEMM-Q and GEMM-O.
#include "flashomni/gemm.h"
#include "tests/cpp/checks.h"

namespace flashomni {
namespace {

using namespace testing;

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

Context odd_counter() {
  Context context;
  context.counter = reinterpret_cast<int32_t*>(6);
  return context;
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
  EXPECT_NO_THROW(run_operator(gemm_q_workspace, gemm_q, a));
  EXPECT_FAILS(gemm_q(a, Context{}), kRuntime, "workspace");
  EXPECT_FAILS(gemm_q(a, odd_counter()), kRuntime, "counter");
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
  EXPECT_FAILS(gemm_o_update(a, odd_counter()), kRuntime, "counter");
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
  EXPECT_FAILS(gemm_o_dispatch(a, odd_counter()), kRuntime, "counter");
}

}  // namespace
}  // namespace flashomni
