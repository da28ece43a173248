#include "flashomni/schedule.h"

#include "flashomni/gemm.h"
#include "tests/cpp/support.h"

namespace flashomni {
namespace {

ScheduleOptions options(int steps, int interval, int warmup, int cooldown, int order) {
  ScheduleOptions o;
  o.num_inference_steps = steps;
  o.cache_interval = interval;
  o.disable_cache_before_step = warmup;
  o.cooldown_steps = cooldown;
  o.max_order = order;
  return o;
}

/// One letter a step: F, U or D; small where the step is recorded.
std::string kinds(const ScheduleOptions& o) {
  std::string result;
  for (int step = 0; step < o.num_inference_steps; ++step) {
    const StepPlan plan = plan_step(o, step);
    const char letter = "FUD"[static_cast<int>(plan.kind)];
    result += plan.record ? static_cast<char>(letter - 'A' + 'a') : letter;
  }
  return result;
}

TEST(ScheduleTest, KindsByHand) {
  EXPECT_EQ(kinds(options(12, 3, 2, 1, 1)), "FfuDDuDDuDDF");
  EXPECT_EQ(kinds(options(12, 3, 2, 1, 0)), "FFuDDuDDuDDF");
  EXPECT_EQ(kinds(options(12, 3, 2, 1, 3)), "ffuDDuDDuDDF");
  EXPECT_EQ(kinds(options(10, 3, 0, 0, 1)), "uDDuDDuDDF");
  EXPECT_EQ(kinds(options(10, 4, 1, 2, 2)), "fuDDDuDDFF");
  EXPECT_EQ(kinds(options(10, 5, 3, 1, 1)), "FFfuDDDDFF");
  EXPECT_EQ(kinds(options(8, 1, 2, 1, 1)), "FfFFFFFF");
  EXPECT_EQ(kinds(options(6, 5, 8, 1, 1)), "FFFFFF");
  EXPECT_EQ(kinds(options(4, 2, 0, 9, 1)), "FFFF");
  EXPECT_EQ(kinds(options(1, 5, 0, 0, 1)), "F");
}

TEST(ScheduleTest, PaperSetting) {
  const ScheduleOptions o = options(50, 5, 8, 1, 1);
  EXPECT_EQ(kinds(o), "FFFFFFFfuDDDDuDDDDuDDDDuDDDDuDDDDuDDDDuDDDDuDDDDFF");
  EXPECT_EQ(plan_step(o, 7).gap, 0);
  EXPECT_EQ(plan_step(o, 8).gap, 1);
  EXPECT_EQ(plan_step(o, 13).gap, 5);
  EXPECT_EQ(plan_step(o, 10).since_update, 2);
  EXPECT_FLOAT_EQ(plan_step(o, 25).ramp, 0.25f);
  EXPECT_FLOAT_EQ(plan_step(o, 0).ramp, 0.0f);
}

TEST(ScheduleTest, RampPowers) {
  ScheduleOptions o = options(50, 5, 8, 1, 1);
  o.ramp_power = 0;
  EXPECT_FLOAT_EQ(plan_step(o, 0).ramp, 1.0f);
  EXPECT_FLOAT_EQ(plan_step(o, 31).ramp, 1.0f);
  o.ramp_power = 1.7f;
  EXPECT_NEAR(plan_step(o, 20).ramp, std::pow(0.4, 1.7), 1e-6);
}

TEST(ScheduleTest, Properties) {
  testing::Random random(1);
  for (int trial = 0; trial < 300; ++trial) {
    ScheduleOptions o;
    o.num_inference_steps = static_cast<int32_t>(testing::uniform(random, 1, 60));
    o.cache_interval = static_cast<int32_t>(testing::uniform(random, 1, 9));
    o.disable_cache_before_step = static_cast<int32_t>(testing::uniform(random, 0, 12));
    o.cooldown_steps = static_cast<int32_t>(testing::uniform(random, 0, 4));
    o.max_order = static_cast<int32_t>(testing::uniform(random, 0, kMaxOrder));
    int last_record = -1, last_update = -1, warmup_records = 0;
    float ramp = 0;
    for (int step = 0; step < o.num_inference_steps; ++step) {
      const StepPlan plan = plan_step(o, step);
      EXPECT_EQ(plan.gap, last_record < 0 ? 0 : step - last_record);
      EXPECT_GE(plan.ramp, ramp);
      EXPECT_LE(plan.ramp, 1.0f);
      ramp = plan.ramp;
      const bool sparse =
          step >= o.disable_cache_before_step && step < o.num_inference_steps - o.cooldown_steps;
      if (!sparse) {
        EXPECT_EQ(plan.kind, StepKind::kFull);
      }
      if (plan.kind == StepKind::kUpdate) {
        EXPECT_TRUE(plan.record);
        last_update = step;
        ASSERT_LT(step + 1, o.num_inference_steps);
        EXPECT_EQ(plan_step(o, step + 1).kind, StepKind::kDispatch);
      }
      if (plan.kind == StepKind::kDispatch) {
        ASSERT_GE(last_update, 0);
        EXPECT_EQ(plan.since_update, step - last_update);
        EXPECT_LT(plan.since_update, o.cache_interval);
        EXPECT_FALSE(plan.record);
      } else {
        EXPECT_EQ(plan.since_update, 0);
      }
      if (plan.kind == StepKind::kFull && plan.record) ++warmup_records;
      if (plan.record) last_record = step;
    }
    EXPECT_LE(warmup_records, o.max_order);
  }
}

TEST(ScheduleTest, RefusesOptionsOutOfRange) {
  const ScheduleOptions good = options(50, 5, 8, 1, 1);
  ScheduleOptions o = good;
  o.num_inference_steps = 0;
  EXPECT_FAILS(plan_step(o, 0), kValue, "num_inference_steps");
  o = good, o.cache_interval = 0;
  EXPECT_FAILS(plan_step(o, 0), kValue, "cache_interval");
  o = good, o.disable_cache_before_step = -1;
  EXPECT_FAILS(plan_step(o, 0), kValue, "disable_cache_before_step");
  o = good, o.cooldown_steps = -1;
  EXPECT_FAILS(plan_step(o, 0), kValue, "cooldown_steps");
  o = good, o.max_order = kMaxOrder + 1;
  EXPECT_FAILS(plan_step(o, 0), kValue, "max_order");
  o = good, o.max_order = -1;
  EXPECT_FAILS(plan_step(o, 0), kValue, "max_order");
  o = good, o.ramp_power = -1;
  EXPECT_FAILS(plan_step(o, 0), kValue, "ramp_power");
  o = good, o.ramp_power = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FAILS(plan_step(o, 0), kValue, "ramp_power");
  EXPECT_FAILS(plan_step(good, -1), kValue, "step");
  EXPECT_FAILS(plan_step(good, 50), kValue, "step");
}

TEST(ScheduleTest, TaylorCoefficients) {
  float c[4];
  taylor_coefficients(3, 3.0f, c);
  EXPECT_FLOAT_EQ(c[0], 1.0f);
  EXPECT_FLOAT_EQ(c[1], 3.0f);
  EXPECT_FLOAT_EQ(c[2], 4.5f);
  EXPECT_FLOAT_EQ(c[3], 4.5f);
  EXPECT_FAILS(taylor_coefficients(4, 1.0f, c), kValue, "order");
  EXPECT_FAILS(taylor_coefficients(-1, 1.0f, c), kValue, "order");
}

}  // namespace
}  // namespace flashomni
