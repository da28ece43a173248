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

void check_orders(int32_t orders) {
  if (orders < 1 || orders > kMaxOrder + 1) {
    fail(ErrorKind::kValue, "orders", text("1 to ", kMaxOrder + 1), text(orders));
  }
}

}  // namespace

void taylor_update(const TaylorUpdateArguments& a, const Context& context) {
  check_orders(a.orders);
  check::float_tensor(a.feature, "feature");
  check_like(a.feature, "feature", a.feature);
  for (int i = 0; i < a.orders; ++i) {
    check_like(a.derivatives[i], kDerivatives[i], a.feature);
    check::output(a.derivatives[i], kDerivatives[i]);
    check::disjoint(a.derivatives[i], kDerivatives[i], a.feature, "feature");
    for (int j = 0; j < i; ++j)
      check::disjoint(a.derivatives[i], kDerivatives[i], a.derivatives[j], kDerivatives[j]);
  }
  if (a.valid < 0 || a.valid >= a.orders) {
    fail(ErrorKind::kValue, "valid", text("0 to ", a.orders - 1), text(a.valid));
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
  for (int i = 0; i < a.orders; ++i) {
    check_like(a.derivatives[i], kDerivatives[i], first);
    check::disjoint(out, "out", a.derivatives[i], kDerivatives[i]);
    if (scaled) {
      check_scales(a.scales[i], kScales[i], first);
      check::disjoint(out, "out", a.scales[i], kScales[i]);
    } else if (a.scales[i].present()) {
      fail(ErrorKind::kType, kScales[0], "a tensor, as another order has scales", "nothing");
    }
  }
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
