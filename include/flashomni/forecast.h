// Forecasting cached features over the steps between two Updates (TaylorSeer, arXiv 2503.06923).
#pragma once

#include <array>

#include "flashomni/backend.h"
#include "flashomni/gemm.h"
#include "flashomni/tensor.h"

namespace flashomni {

/// Finite differences at an Update: new[0] = feature, new[i + 1] = (new[i] - old[i]) / gap for i < valid, 0
/// above. derivatives[i]: feature's shape, old in, new out; `orders` of them. `valid` says how many
/// differences the history supports (0 at the first Update).
///
/// last: of feature's shape and dtype, or absent; receives new[orders], which nobody keeps. `valid` is at
/// most orders - 1, with `last` at most orders.
///
/// With scales (of every order or of none), the derivatives are what quantize_fp8 makes: the old ones are
/// read so, each new one goes on to the next before it is quantised. `last` is not quantised.
struct TaylorUpdateArguments {
  TensorView feature;
  int32_t orders = 1;
  std::array<TensorView, kMaxOrder + 1> derivatives, scales;
  TensorView last;
  int32_t valid = 0;
  float gap = 1;
};
FLASHOMNI_API void taylor_update(const TaylorUpdateArguments& arguments, const Context& context);

/// Which rows of a joint sequence are forecast: those of row blocks whose bit is 0, or 1.
enum class ForecastRows : int32_t { kAll, kCached, kActive };

/// out = sum_i coefficients[i] * derivatives[i]; coefficients float32 [orders].
///
/// With scales (of every order or of none), the derivatives are what quantize_fp8 made of them. Unless `rows`
/// is kAll, tensors are [B, M, N], `tiles` have one head, and the other rows of `out` stay as they were;
/// nothing of these rows is read.
struct TaylorForecastArguments {
  int32_t orders = 1;
  std::array<TensorView, kMaxOrder + 1> derivatives, scales;
  TensorView coefficients, out;
  TileSymbols tiles;
  ForecastRows rows = ForecastRows::kAll;
};
FLASHOMNI_API void taylor_forecast(const TaylorForecastArguments& arguments, const Context& context);

/// Columns that share a scale.
inline constexpr int64_t kScaleColumns = 128;

/// values = x / scale in e4m3 (4 bits of exponent, 3 of mantissa, largest 448), rounded to the nearest, ties
/// to even; each run of 128 columns of a row has a scale of its own, its largest magnitude / 448. x [.., W]
/// of any float type; values uint8, of x's shape; scales float32 [.., ceil(W / 128)]. A run that holds an
/// infinity reads back as NaN, a NaN is one NaN; magnitudes below 2^-100 count as 0.
struct QuantizeArguments {
  TensorView x, values, scales;
};
FLASHOMNI_API void quantize_fp8(const QuantizeArguments& arguments, const Context& context);

}  // namespace flashomni
