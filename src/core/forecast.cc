#include "flashomni/forecast.h"

#include <cmath>

#include "src/core/check.h"

namespace flashomni {
namespace {

constexpr const char* kDerivatives[] = {"derivatives[0]", "derivatives[1]", "derivatives[2]",
                                        "derivatives[3]"};
static_assert(std::size(kDerivatives) == kMaxOrder + 1);

/// As check::tensor, with the shape and type of another view.
void check_like(const TensorView& view, const char* name, const TensorView& like) {
  const auto& s = like.shape;
  switch (like.ndim) {
    case 1:
      return check::tensor(view, name, like.dtype, like.device, {s[0]});
    case 2:
      return check::tensor(view, name, like.dtype, like.device, {s[0], s[1]});
    case 3:
      return check::tensor(view, name, like.dtype, like.device, {s[0], s[1], s[2]});
    case 4:
      return check::tensor(view, name, like.dtype, like.device, {s[0], s[1], s[2], s[3]});
  }
  fail(ErrorKind::kValue, name, "1 to 4 dimensions", describe(like));
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
  const TensorView& first = a.derivatives[0];
  check::float_tensor(first, kDerivatives[0]);
  check::tensor(a.coefficients, "coefficients", DType::kFloat32, first.device, {a.orders});
  check_like(a.out, "out", first);
  check::output(a.out, "out");
  check::disjoint(a.out, "out", a.coefficients, "coefficients");
  for (int i = 0; i < a.orders; ++i) {
    check_like(a.derivatives[i], kDerivatives[i], first);
    check::disjoint(a.out, "out", a.derivatives[i], kDerivatives[i]);
  }
  check::threads(context);
  const Backend& backend = backend_for(first.device);
  if (a.out.numel() > 0) backend.taylor_forecast(a, context);
}

}  // namespace flashomni
