// Forecasting cached features over the steps between two Updates (TaylorSeer, arXiv 2503.06923).
#pragma once

#include <array>

#include "flashomni/backend.h"
#include "flashomni/gemm.h"
#include "flashomni/tensor.h"

namespace flashomni {

/// Finite differences at an Update: new[0] = feature, new[i + 1] = (new[i] - old[i]) / gap for i < valid, 0
/// above. derivatives[i]: feature's shape, old in, new out; `orders` = D + 1 of them. `valid` <= orders - 1
/// says how many differences the history supports (0 at the first Update).
struct TaylorUpdateArguments {
  TensorView feature;
  int32_t orders = 1;
  std::array<TensorView, kMaxOrder + 1> derivatives;
  int32_t valid = 0;
  float gap = 1;
};
FLASHOMNI_API void taylor_update(const TaylorUpdateArguments& arguments, const Context& context);

/// out = sum_i coefficients[i] * derivatives[i]; coefficients float32 [orders].
struct TaylorForecastArguments {
  int32_t orders = 1;
  std::array<TensorView, kMaxOrder + 1> derivatives;
  TensorView coefficients, out;
};
FLASHOMNI_API void taylor_forecast(const TaylorForecastArguments& arguments, const Context& context);

}  // namespace flashomni
