// Every argument check of differences, forecasts and quantisation.
#include "flashomni/forecast.h"
#include "tests/cpp/checks.h"

namespace flashomni {
namespace {

using namespace testing;

TEST(ForecastChecks, Update) {
  using A = TaylorUpdateArguments;
  Array feature(kHalf, {2, 40, 96}), first(kHalf, {2, 40, 96}), second(kHalf, {2, 40, 96}),
      last(kHalf, {2, 40, 96});
  A a;
  a.feature = feature, a.orders = 2, a.derivatives[0] = first, a.derivatives[1] = second, a.last = last,
  a.valid = 2, a.gap = 5;
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
      {"last", V, [](A& v) { v.last = v.feature; }},
      {"last", V, [](A& v) { v.last = v.derivatives[1]; }},
      {"last", V, [](A& v) { v.last.strides[0] = 0; }},
      {"valid", V, [](A& v) { v.last = {}; }},
      {"valid", V, [](A& v) { v.valid = 3; }},
      {"valid", V, [](A& v) { v.valid = -1; }},
      {"gap", V, [](A& v) { v.gap = 0; }},
  };
  for (int i = 0; i < 2; ++i) {
    const char* name = i == 0 ? "derivatives[0]" : "derivatives[1]";
    add_tensor_faults<A>(&faults, name, [i](A& v) -> TensorView& { return v.derivatives[i]; }, true);
    add_device_fault<A>(&faults, name, [i](A& v) -> TensorView& { return v.derivatives[i]; });
  }
  add_tensor_faults<A>(&faults, "last", [](A& v) -> TensorView& { return v.last; }, false);
  add_device_fault<A>(&faults, "last", [](A& v) -> TensorView& { return v.last; });
  expect_faults<A>(a, faults, [](const A& v) { taylor_update(v, Context{}); });
  a.last = {}, a.valid = 1;
  EXPECT_NO_THROW(taylor_update(a, Context{}));
  a.valid = 0, a.gap = 0;  // the first Update has no gap
  EXPECT_NO_THROW(taylor_update(a, Context{}));
}

TEST(ForecastChecks, UpdateOfQuantised) {
  using A = TaylorUpdateArguments;
  Array feature(kHalf, {40, 200}), first(DType::kUInt8, {40, 200}), second(DType::kUInt8, {40, 200}),
      scales(kSingle, {40, 2}), more(kSingle, {40, 2});
  A a;
  a.feature = feature, a.orders = 2, a.derivatives[0] = first, a.derivatives[1] = second,
  a.scales[0] = scales, a.scales[1] = more, a.valid = 1, a.gap = 5;
  std::vector<Fault<A>> faults = {
      {"derivatives[0]", T, [](A& v) { v.scales[0] = {}; }},
      {"derivatives[0]", V, [](A& v) { v.derivatives[0].data = v.feature.data; }},
      {"derivatives[1]", V, [](A& v) { v.derivatives[1] = v.derivatives[0]; }},
      {"derivatives[1]", V, [](A& v) { v.scales[0].data = v.derivatives[1].data; }},
      {"scales[0]", V, [](A& v) { v.scales[0].data = v.derivatives[0].data; }},
      {"scales[0]", V, [](A& v) { v.scales[0].data = v.feature.data; }},
      {"scales[1]", V, [](A& v) { v.scales[1] = v.scales[0]; }},
      {"scales[1]", V, [](A& v) { v.scales[1].data = v.derivatives[0].data; }},
      {"scales[1]", V, [](A& v) { v.scales[1].strides[0] = 0; }},
      {"last", V,
       [](A& v) {
         v.last = v.feature;
         v.last.data = v.scales[1].data;
       }},
      {"last", T, [](A& v) { v.last = v.derivatives[1]; }},
      {"valid", V, [](A& v) { v.valid = 2; }},
      {"gap", V, [](A& v) { v.gap = 0; }},
  };
  const std::vector<std::pair<const char*, std::function<TensorView&(A&)>>> tensors = {
      {"derivatives[1]", [](A& v) -> TensorView& { return v.derivatives[1]; }},
      {"scales[1]", [](A& v) -> TensorView& { return v.scales[1]; }}};
  for (const auto& tensor : tensors) {
    add_tensor_faults<A>(&faults, tensor.first, tensor.second, true);
    add_device_fault<A>(&faults, tensor.first, tensor.second);
  }
  expect_faults<A>(a, faults, [](const A& v) { taylor_update(v, Context{}); });
  Array plain(kHalf, {40, 200}), other(kHalf, {40, 200});
  a.derivatives[0] = plain, a.derivatives[1] = other, a.scales[0] = {};
  EXPECT_THROW(taylor_update(a, Context{}), Error);  // scales of one order alone
}

TEST(ForecastChecks, ForecastOfRows) {
  using A = TaylorForecastArguments;
  Array first(kHalf, {2, 40, 96}), out(kHalf, {2, 40, 96}), coefficients(kSingle, {1}),
      cache(DType::kUInt8, {2, 2});
  A a;
  a.derivatives[0] = first, a.coefficients = coefficients, a.out = out, a.rows = ForecastRows::kCached;
  a.tiles.cache = cache, a.tiles.tokens = 1100, a.tiles.row_offset = 1060;
  std::vector<Fault<A>> faults = {
      {"rows", V, [](A& v) { v.rows = static_cast<ForecastRows>(3); }},
      {"rows", V, [](A& v) { v.rows = static_cast<ForecastRows>(-1); }},
      {"heads", V, [](A& v) { v.tiles.heads = 2; }},
      {"row_offset", V, [](A& v) { v.tiles.row_offset = -1; }},
      {"row_offset", V, [](A& v) { v.tiles.row_offset = 1061; }},
      {"tokens", V, [](A& v) { v.tiles.tokens = -1; }},
      {"block_q", V, [](A& v) { v.tiles.block_q = 96; }},
      {"symbols.cache", V, [](A& v) { v.tiles.tokens = 2100; }},
      {"out", V, [](A& v) { v.out.ndim = v.derivatives[0].ndim = 2; }},
      {"out", V, [](A& v) { v.tiles.cache.data = v.out.data; }},
  };
  const auto cache_of = [](A& v) -> TensorView& { return v.tiles.cache; };
  add_tensor_faults<A>(&faults, "symbols.cache", cache_of, false);
  add_device_fault<A>(&faults, "symbols.cache", cache_of);
  expect_faults<A>(a, faults, [](const A& v) { taylor_forecast(v, Context{}); });
  a.rows = ForecastRows::kAll, a.tiles = {};
  a.tiles.row_offset = -1;
  EXPECT_THROW(taylor_forecast(a, Context{}), Error);
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
