#include "flashomni/backend.h"

#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::ScopedVariable;

TEST(BackendTest, TheCpuServesTheCpu) {
  EXPECT_STREQ(backend_for(Device{}).name, "cpu");
  bool found = false;
  for (const BackendStatus& status : backend_statuses()) {
    if (status.name != "cpu") continue;
    found = true;
    EXPECT_TRUE(status.serves);
    EXPECT_EQ(status.device, "cpu");
  }
  EXPECT_TRUE(found);
}

TEST(BackendTest, EveryRowIsComplete) {
  const Backend& b = backend_for(Device{});
  EXPECT_TRUE(b.attention_workspace && b.attention && b.gemm_q_workspace && b.gemm_q &&
              b.gemm_o_update_workspace && b.gemm_o_update && b.gemm_o_dispatch_workspace &&
              b.gemm_o_dispatch && b.block_mean && b.select_flashomni_workspace && b.select_flashomni &&
              b.summarize_symbols && b.norm_rope && b.norm_rope_mean && b.taylor_update &&
              b.taylor_forecast && b.quantize_fp8);
}

TEST(BackendTest, EnvironmentForcesOne) {
  {
    ScopedVariable force("FLASHOMNI_BACKEND", "cpu");
    EXPECT_STREQ(backend_for(Device{}).name, "cpu");
    EXPECT_FAILS(backend_for(Device{DeviceType::kCUDA, 0}), kNotImplemented, "device");
  }
  {
    ScopedVariable force("FLASHOMNI_BACKEND", "abacus");
    EXPECT_FAILS(backend_for(Device{}), kValue, "FLASHOMNI_BACKEND");
  }
  {
    ScopedVariable force("FLASHOMNI_BACKEND", "");
    EXPECT_STREQ(backend_for(Device{}).name, "cpu");
  }
}

TEST(BackendTest, AnUnservedDeviceGetsTheReasons) {
  try {
    backend_for(Device{DeviceType::kCUDA, 1});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kNotImplemented);
    EXPECT_NE(std::string(error.what()).find("cuda:1"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("cpu: "), std::string::npos) << error.what();
  }
}

TEST(InstructionSetTest, GenericIsAlwaysThere) {
  const std::vector<std::string> names = testing::instruction_sets();
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names.back(), "generic");
  ScopedVariable none("FLASHOMNI_CPU_ISA", "");
  EXPECT_EQ(cpu_isa(), names.front());
}

TEST(InstructionSetTest, EnvironmentForcesOne) {
  for (const std::string& name : testing::instruction_sets()) {
    ScopedVariable force("FLASHOMNI_CPU_ISA", name);
    EXPECT_EQ(cpu_isa(), name);
  }
  ScopedVariable force("FLASHOMNI_CPU_ISA", "abacus");
  EXPECT_FAILS(cpu_isa(), kValue, "FLASHOMNI_CPU_ISA");
}

}  // namespace
}  // namespace flashomni
