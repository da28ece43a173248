// Which denoising steps are Full, Update or Dispatch, and the numbers that forecasting needs.
#pragma once

#include <cstdint>

#include "flashomni/export.h"

namespace flashomni {

enum class StepKind : int32_t {
  kFull,      ///< dense, caches untouched
  kUpdate,    ///< dense, symbols chosen anew, caches refreshed
  kDispatch,  ///< obeys the symbols
};

/// Field names follow diffusers' cache configurations.
struct ScheduleOptions {
  int32_t num_inference_steps = 50;
  int32_t cache_interval = 5;             ///< N: an Update every N steps
  int32_t disable_cache_before_step = 8;  ///< warm-up: the first steps are Full
  int32_t cooldown_steps = 1;             ///< the last steps are Full
  int32_t max_order = 1;                  ///< D
  float ramp_power = 2.0f;                ///< f(t) = (step / num_inference_steps)^power; 0: f = 1
};

struct StepPlan {
  StepKind kind = StepKind::kFull;
  bool record =
      false;  ///< feed this step's features to the forecast history (Updates, and the last D warm-up steps)
  int32_t since_update = 0;  ///< k: steps since the last Update; 0 unless Dispatch
  int32_t gap = 0;           ///< steps since the previous recorded step; 0 if there is none
  float ramp = 1.0f;         ///< f(t)
};

/// The plan of one step, 0 <= step < num_inference_steps. A window of one step only (an Update with no
/// Dispatch after it) is Full. Throws ValueError on options out of range.
FLASHOMNI_API StepPlan plan_step(const ScheduleOptions& options, int32_t step);

/// coefficients[i] = k^i / i!, i = 0..order (TaylorSeer, arXiv 2503.06923, eq. 6).
FLASHOMNI_API void taylor_coefficients(int32_t order, float k, float* coefficients);

}  // namespace flashomni
