#include "flashomni/schedule.h"

#include <algorithm>
#include <cmath>

#include "flashomni/error.h"
#include "flashomni/gemm.h"

namespace flashomni {
namespace {

void check(const ScheduleOptions& o, int32_t step) {
  const auto at_least = [](int32_t value, int32_t least, const char* name) {
    if (value < least) fail(ErrorKind::kValue, name, text("at least ", least), text(value));
  };
  at_least(o.num_inference_steps, 1, "num_inference_steps");
  at_least(o.cache_interval, 1, "cache_interval");
  at_least(o.disable_cache_before_step, 0, "disable_cache_before_step");
  at_least(o.cooldown_steps, 0, "cooldown_steps");
  if (o.max_order < 0 || o.max_order > kMaxOrder) {
    fail(ErrorKind::kValue, "max_order", text("0 to ", kMaxOrder), text(o.max_order));
  }
  if (!std::isfinite(o.ramp_power) || o.ramp_power < 0) {
    fail(ErrorKind::kValue, "ramp_power", "a finite number of at least 0", text(o.ramp_power));
  }
  if (step < 0 || step >= o.num_inference_steps) {
    fail(ErrorKind::kValue, "step", text("0 to ", o.num_inference_steps - 1), text(step));
  }
}

int32_t cooldown_start(const ScheduleOptions& o) {
  return o.num_inference_steps - o.cooldown_steps;
}

/// Where a step lies in its window: 0 would be an Update, 1 .. interval - 1 Dispatches; -1 outside all
/// windows.
int32_t place_in_window(const ScheduleOptions& o, int32_t step) {
  if (step < o.disable_cache_before_step || step >= cooldown_start(o)) return -1;
  return (step - o.disable_cache_before_step) % o.cache_interval;
}

StepKind kind_of(const ScheduleOptions& o, int32_t step) {
  const int32_t place = place_in_window(o, step);
  if (place > 0) return StepKind::kDispatch;
  // Symbols that no step would obey are not worth choosing.
  if (place == 0 && place_in_window(o, step + 1) > 0) return StepKind::kUpdate;
  return StepKind::kFull;
}

bool records(const ScheduleOptions& o, int32_t step) {
  const int32_t warmup = o.disable_cache_before_step;
  if (step < warmup) return step >= warmup - std::min(o.max_order, warmup) && step < cooldown_start(o);
  return kind_of(o, step) == StepKind::kUpdate;
}

}  // namespace

StepPlan plan_step(const ScheduleOptions& options, int32_t step) {
  check(options, step);
  StepPlan plan;
  plan.kind = kind_of(options, step);
  plan.record = records(options, step);
  if (plan.kind == StepKind::kDispatch) plan.since_update = place_in_window(options, step);
  int32_t previous = step - 1;
  while (previous >= 0 && !records(options, previous)) --previous;
  if (previous >= 0) plan.gap = step - previous;
  const double progress = static_cast<double>(step) / options.num_inference_steps;
  plan.ramp = static_cast<float>(std::pow(progress, static_cast<double>(options.ramp_power)));
  return plan;
}

void taylor_coefficients(int32_t order, float k, float* coefficients) {
  if (order < 0 || order > kMaxOrder) {
    fail(ErrorKind::kValue, "order", text("0 to ", kMaxOrder), text(order));
  }
  double term = 1.0;
  for (int32_t i = 0; i <= order; ++i) {
    coefficients[i] = static_cast<float>(term);
    term *= static_cast<double>(k) / (i + 1);
  }
}

}  // namespace flashomni
