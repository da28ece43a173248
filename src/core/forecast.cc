#include "flashomni/forecast.h"

#include <cmath>

#include "src/core/check.h"

namespace flashomni {
namespace {

constexpr const char* kDerivatives[] = {"derivatives[0]", "derivatives[1]", "derivatives[2]",
                                        "derivatives[3]"};
constexpr const char* kScales[] = {"scales[0]", "scales[1]", "scales[2]", "scales[3]"};
static_assert(std::size(kDerivatives) == kMaxOrder + 1 && std::size(kScales) == kMaxOrder + 1);

/// As check::tensor, with the shape and device of another view.
void check_like(const TensorView& view, const char* name, const TensorView& like, DType dtype) {
  const auto& s = like.shape;
  switch (like.ndim) {
    case 1:
      return check::tensor(view, name, dtype, like.device, {s[0]});
    case 2:
      return check::tensor(view, name, dtype, like.device, {s[0], s[1]});
    case 3:
      return check::tensor(view, name, dtype, like.device, {s[0], s[1], s[2]});
    case 4:
      return check::tensor(view, name, dtype, like.device, {s[0], s[1], s[2], s[3]});
  }
  fail(ErrorKind::kValue, name, "1 to 4 dimensions", describe(like));
}
void check_like(const TensorView& view, const char* name, const TensorView& like) {
  check_like(view, name, like, like.dtype);
}

/// The scales of a tensor of x's shape.
void check_scales(const TensorView& scales, const char* name, TensorView x) {
  if (x.ndim > 0) x.shape[x.ndim - 1] = ceil_div(x.shape[x.ndim - 1], kScaleColumns);
  check_like(scales, name, x, DType::kFloat32);
}

/// The orders of a difference or forecast: of one shape; float16, bfloat16 or float32 without scales, e4m3's
/// bytes with them, which every order has or none.
void check_scaled(const std::array<TensorView, kMaxOrder + 1>& derivatives,
                  const std::array<TensorView, kMaxOrder + 1>& scales, int32_t orders, DType dtype,
                  const TensorView& like) {
  const bool scaled = scales[0].present();
  for (int i = 0; i < orders; ++i) {
    check_like(derivatives[i], kDerivatives[i], like, scaled ? DType::kUInt8 : dtype);
    if (scaled) {
      check_scales(scales[i], kScales[i], derivatives[i]);
    } else if (scales[i].present()) {
      fail(ErrorKind::kType, kScales[0], "a tensor, as another order has scales", "nothing");
    }
  }
}

void check_orders(int32_t orders) {
  if (orders < 1 || orders > kMaxOrder + 1) {
    fail(ErrorKind::kValue, "orders", text("1 to ", kMaxOrder + 1), text(orders));
  }
}

/// What order `order` writes, beside the feature and what orders below write.
void check_written(const TaylorUpdateArguments& a, const TensorView& view, const char* name, int order) {
  check::output(view, name);
  check::disjoint(view, name, a.feature, "feature");
  for (int i = 0; i < order; ++i) {
    check::disjoint(view, name, a.derivatives[i], kDerivatives[i]);
    check::disjoint(view, name, a.scales[i], kScales[i]);
  }
}

/// Where some rows are forecast and others left out.
void check_rows(const TaylorForecastArguments& a) {
  check::at_least(a.tiles.row_offset, 0, "row_offset");
  if (a.rows == ForecastRows::kAll) return;
  if (a.rows != ForecastRows::kCached && a.rows != ForecastRows::kActive) {
    fail(ErrorKind::kValue, "rows", "all, cached or active", text(static_cast<int>(a.rows)));
  }
  if (a.out.ndim != 3) fail(ErrorKind::kValue, "out", "[B, M, N], as its rows have symbols", describe(a.out));
  if (a.tiles.heads != 1) fail(ErrorKind::kValue, "heads", "1: one bit a row block", text(a.tiles.heads));
  check::tiles(a.tiles, a.out.size(0), a.out.size(1), a.out.device, "out");
  check::disjoint(a.out, "out", a.tiles.cache, "symbols.cache");
  check::disjoint(a.out, "out", a.tiles.cache_indptr, "symbols.cache_indptr");
}

}  // namespace

void taylor_update(const TaylorUpdateArguments& a, const Context& context) {
  check_orders(a.orders);
  check::float_tensor(a.feature, "feature");
  check_like(a.feature, "feature", a.feature);
  check_scaled(a.derivatives, a.scales, a.orders, a.feature.dtype, a.feature);
  for (int i = 0; i < a.orders; ++i) {
    check_written(a, a.derivatives[i], kDerivatives[i], i);
    if (a.scales[i].present()) {
      check_written(a, a.scales[i], kScales[i], i);
      check::disjoint(a.scales[i], kScales[i], a.derivatives[i], kDerivatives[i]);
    }
  }
  if (a.last.present()) {
    check_like(a.last, "last", a.feature);
    check_written(a, a.last, "last", a.orders);
  }
  const int32_t most = a.orders - (a.last.present() ? 0 : 1);
  if (a.valid < 0 || a.valid > most) {
    fail(ErrorKind::kValue, "valid", text("0 to ", most), text(a.valid));
  }
  if (a.valid > 0 && !(a.gap > 0.0f && std::isfinite(a.gap))) {
    fail(ErrorKind::kValue, "gap", "a finite number above 0", text(a.gap));
  }
  check::threads(context);
  const Backend& backend = backend_for(a.feature.device);
  if (a.feature.numel() > 0) backend.taylor_update(a, context);
}

void taylor_forecast(const TaylorForecastArguments& a, const Context& context) {
  check_orders(a.orders);
  const TensorView &first = a.derivatives[0], &out = a.out;
  const bool scaled = a.scales[0].present();
  if (scaled) {
    check_like(first, kDerivatives[0], first, DType::kUInt8);
    check::float_tensor(out, "out");
  } else {
    check::float_tensor(first, kDerivatives[0]);
  }
  check::tensor(a.coefficients, "coefficients", DType::kFloat32, first.device, {a.orders});
  check_like(out, "out", first, scaled ? out.dtype : first.dtype);
  check::output(out, "out");
  check::disjoint(out, "out", a.coefficients, "coefficients");
  check_scaled(a.derivatives, a.scales, a.orders, first.dtype, first);
  for (int i = 0; i < a.orders; ++i) {
    check::disjoint(out, "out", a.derivatives[i], kDerivatives[i]);
    check::disjoint(out, "out", a.scales[i], kScales[i]);
  }
  check_rows(a);
  check::threads(context);
  const Backend& backend = backend_for(out.device);
  if (out.numel() > 0) backend.taylor_forecast(a, context);
}

void quantize_fp8(const QuantizeArguments& a, const Context& context) {
  check::float_tensor(a.x, "x");
  check_like(a.x, "x", a.x);
  check_like(a.values, "values", a.x, DType::kUInt8);
  check::output(a.values, "values");
  check_scales(a.scales, "scales", a.x);
  check::output(a.scales, "scales");
  check::disjoint(a.values, "values", a.x, "x");
  check::disjoint(a.scales, "scales", a.x, "x");
  check::disjoint(a.scales, "scales", a.values, "values");
  check::threads(context);
  const Backend& backend = backend_for(a.x.device);
  if (a.x.numel() > 0) backend.quantize_fp8(a, context);
}

}  // namespace flashomni
