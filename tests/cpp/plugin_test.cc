#include "flashomni/plugin.h"

#include <sys/mman.h>

#include <cstdio>
#include <filesystem>

#include "flashomni/attention.h"
#include "flashomni/forecast.h"
#include "flashomni/gemm.h"
#include "flashomni/select.h"
#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::ScopedVariable;

std::string fake(const std::string& name) {
  return text(FLASHOMNI_FAKE_PLUGINS, "/libfake_plugin_", name, ".so");
}

/// The error of a statement, or "" if there was none.
template <class Body>
std::string error_of(Body&& body, ErrorKind kind = ErrorKind::kRuntime) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

/// Memory that nobody may touch, as a GPU's is to the host.
class Forbidden {
 public:
  static constexpr size_t kBytes = 1 << 24;
  Forbidden() : memory_(mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {}
  ~Forbidden() { munmap(memory_, kBytes); }
  Forbidden(const Forbidden&) = delete;
  Forbidden& operator=(const Forbidden&) = delete;

  TensorView view(DType dtype, std::initializer_list<int64_t> shape, int device = 0) {
    const TensorView result =
        make_view(static_cast<char*>(memory_) + used_, dtype, shape, {DeviceType::kCUDA, device});
    used_ += static_cast<size_t>((result.numel() * bytes_of(dtype) + 63) / 64 * 64);
    EXPECT_LE(used_, kBytes);
    return result;
  }

 private:
  void* memory_;
  size_t used_ = 0;
};

/// Attention over two elements of 300 and 200 tokens, 2 heads of 64.
AttentionArguments ragged_attention(Forbidden& gpu) {
  AttentionArguments a;
  a.q = gpu.view(DType::kBFloat16, {500, 2, 64});
  a.k = gpu.view(DType::kBFloat16, {500, 2, 64});
  a.v = gpu.view(DType::kBFloat16, {500, 2, 64});
  a.out = gpu.view(DType::kBFloat16, {500, 2, 64});
  a.lse = gpu.view(DType::kFloat32, {500, 2});
  a.q_indptr = gpu.view(DType::kInt32, {3});
  a.kv_indptr = gpu.view(DType::kInt32, {3});
  a.symbols.cache = gpu.view(DType::kUInt8, {2});
  a.symbols.cache_indptr = gpu.view(DType::kInt32, {3});
  a.symbols.skip = gpu.view(DType::kUInt8, {5});
  a.symbols.skip_indptr = gpu.view(DType::kInt32, {3});
  return a;
}

class PluginTest : public ::testing::Test {
 protected:
  ScopedVariable no_backend_{"FLASHOMNI_BACKEND", ""};
  ScopedVariable no_path_{"FLASHOMNI_PLUGIN_PATH", ""};
};

TEST_F(PluginTest, WrongLibrariesAreRefused) {
  const auto loading = [](const std::string& path) { return error_of([&] { load_plugin(path); }); };
  EXPECT_NE(loading("/nowhere/libnothing.so").find("can be loaded"), std::string::npos);
  EXPECT_NE(loading(fake("no_symbol")).find("without the symbol flashomni_plugin"), std::string::npos);
  EXPECT_NE(loading(fake("other_abi")).find("version 77"), std::string::npos);
  EXPECT_NE(loading(fake("other_size")).find("12 bytes"), std::string::npos);
  EXPECT_NE(loading(fake("no_table")).find("got none"), std::string::npos);
  EXPECT_NE(loading(fake("unknown_name")).find("got cuda_abacus"), std::string::npos);
  EXPECT_TRUE(loaded_plugins().empty());
}

TEST_F(PluginTest, WithoutAPluginTheErrorSaysWhatToDo) {
  set_plugin_search(false);
  const std::string message =
      error_of([] { backend_for(Device{DeviceType::kCUDA, 0}); }, ErrorKind::kNotImplemented);
  EXPECT_NE(message.find("cuda_sm90: its plugin is not loaded"), std::string::npos) << message;
  EXPECT_NE(message.find("load_plugin"), std::string::npos) << message;
  set_plugin_search(true);
}

TEST_F(PluginTest, ABrokenLibraryInTheSearchPathIsTold) {
  const auto folder = std::filesystem::path(::testing::TempDir()) / "flashomni_broken_plugin";
  std::filesystem::create_directories(folder);
  std::fclose(std::fopen((folder / "libflashomni_cuda_sm90.so").c_str(), "w"));
  ScopedVariable path("FLASHOMNI_PLUGIN_PATH", "/nowhere::" + folder.string());
  const std::string message =
      error_of([] { backend_for(Device{DeviceType::kCUDA, 0}); }, ErrorKind::kNotImplemented);
  EXPECT_NE(message.find(folder.string()), std::string::npos) << message;
  std::filesystem::remove_all(folder);
}

/// With the working plugin, found by search. The process keeps it, so these run last.
class PluginZLoadedTest : public PluginTest {
 protected:
  PluginZLoadedTest() {
    if (!loaded_plugins().empty()) return;
    const auto folder = std::filesystem::path(::testing::TempDir()) / text("flashomni_plugin_", getpid());
    std::filesystem::create_directories(folder);
    std::filesystem::copy_file(fake("good"), folder / "libflashomni_cuda_sm90.so");
    ScopedVariable path("FLASHOMNI_PLUGIN_PATH", folder.string());
    EXPECT_STREQ(backend_for(Device{DeviceType::kCUDA, 0}).name, "cuda_sm90");
    std::filesystem::remove_all(folder);
  }
  Forbidden gpu_;
};

TEST_F(PluginZLoadedTest, ServesTheDevicesThatItSays) {
  for (int i = 0; i < 3; ++i) EXPECT_STREQ(backend_for(Device{DeviceType::kCUDA, 1}).name, "cuda_sm90");
  EXPECT_STREQ(backend_for(Device{}).name, "cpu");
  const std::string message =
      error_of([] { backend_for(Device{DeviceType::kCUDA, 2}); }, ErrorKind::kNotImplemented);
  EXPECT_NE(message.find("compute capability 1.0 of device Abacus"), std::string::npos) << message;
  ScopedVariable force("FLASHOMNI_BACKEND", "cpu");
  EXPECT_FAILS(backend_for(Device{DeviceType::kCUDA, 0}), kNotImplemented, "device");
  ASSERT_EQ(loaded_plugins().size(), 1u);
  EXPECT_EQ(loaded_plugins()[0].name, "cuda_sm90");
  EXPECT_EQ(loaded_plugins()[0].sources, "fake");
  EXPECT_EQ(load_plugin(loaded_plugins()[0].path), "cuda_sm90");
  EXPECT_NE(error_of([] { load_plugin(fake("good")); }).find("a second one"), std::string::npos);
}

TEST_F(PluginZLoadedTest, ChecksLeaveDeviceMemoryAlone) {
  AttentionArguments a = ragged_attention(gpu_);
  Context context;
  EXPECT_EQ(attention_workspace(a, context), 192u);
  int calls = 0;
  const testing::Workspace workspace(192);
  context = workspace.context(0);
  context.stream = &calls;
  attention(a, context);
  EXPECT_EQ(calls, 1);

  AttentionArguments b;
  b.q = gpu_.view(DType::kFloat16, {2, 200, 4, 128});
  b.k = gpu_.view(DType::kFloat16, {2, 300, 2, 128});
  b.v = gpu_.view(DType::kFloat16, {2, 300, 2, 128});
  b.out = gpu_.view(DType::kFloat16, {2, 200, 4, 128});
  b.kv_block_len = gpu_.view(DType::kInt32, {3});
  b.k_mean = gpu_.view(DType::kFloat32, {2, 3, 2, 128});
  b.v_mean = gpu_.view(DType::kFloat32, {2, 3, 2, 128});
  b.symbols.cache = gpu_.view(DType::kUInt8, {2, 1});
  b.symbols.skip = gpu_.view(DType::kUInt8, {2, 3});
  attention(b, context);
  EXPECT_EQ(calls, 2);
  b.symbols.skip = gpu_.view(DType::kUInt8, {2, 4});
  EXPECT_FAILS(attention(b, context), kValue, "symbols.skip");
  EXPECT_EQ(calls, 2);
}

TEST_F(PluginZLoadedTest, ItsErrorsKeepKindAndMessage) {
  AttentionArguments a = ragged_attention(gpu_);
  int calls = 0;
  const testing::Workspace workspace(192);
  Context context = workspace.context(0);
  context.stream = &calls;
  for (const ErrorKind kind :
       {ErrorKind::kValue, ErrorKind::kType, ErrorKind::kNotImplemented, ErrorKind::kRuntime}) {
    a.scale = 10.0f + static_cast<float>(kind);
    EXPECT_EQ(error_of([&] { attention(a, context); }, kind), "scale: too large");
  }
  a.q.device.id = 1;
  EXPECT_FAILS(attention(a, context), kValue, "k");
  EXPECT_EQ(calls, 0);
}

TEST_F(PluginZLoadedTest, AMissingOperatorIsNamedWithItsBackend) {
  const auto missing = [&](const char* name, auto&& body) {
    const std::string message = error_of(body, ErrorKind::kNotImplemented);
    EXPECT_EQ(message.rfind(text(name, ": expected "), 0), 0u) << message;
    EXPECT_NE(message.find("cuda_sm90"), std::string::npos) << message;
  };
  const Context context;
  GemmQArguments q;
  q.x = gpu_.view(DType::kFloat16, {1, 100, 64});
  q.weight = gpu_.view(DType::kFloat16, {32, 64});
  q.out = gpu_.view(DType::kFloat16, {1, 100, 32});
  q.tiles.tokens = 100;
  q.tiles.cache = gpu_.view(DType::kUInt8, {1, 1});
  missing("gemm_q", [&] { gemm_q_workspace(q, context); });
  missing("gemm_q", [&] { gemm_q(q, context); });
  GemmOUpdateArguments update;
  update.o[0] = gpu_.view(DType::kFloat16, {1, 100, 64});
  update.weight = gpu_.view(DType::kFloat16, {32, 64});
  update.out = gpu_.view(DType::kFloat16, {1, 100, 32});
  update.cached[0] = gpu_.view(DType::kFloat16, {1, 100, 32});
  update.head_dim = 64;
  missing("gemm_o_update", [&] { gemm_o_update(update, context); });
  GemmODispatchArguments dispatch;
  dispatch.o = update.o[0];
  dispatch.weight = update.weight;
  dispatch.out = update.out;
  dispatch.cached[0] = update.cached[0];
  dispatch.coefficients = gpu_.view(DType::kFloat32, {1});
  dispatch.head_dim = 64;
  missing("gemm_o_dispatch", [&] { gemm_o_dispatch(dispatch, context); });
  BlockMeanArguments mean;
  mean.x = gpu_.view(DType::kFloat16, {1, 100, 2, 64});
  mean.out = gpu_.view(DType::kFloat32, {1, 1, 2, 64});
  missing("block_mean", [&] { block_mean(mean, context); });
  SelectArguments select;
  select.q_mean = gpu_.view(DType::kFloat32, {1, 2, 2, 64});
  select.k_mean = gpu_.view(DType::kFloat32, {1, 2, 2, 64});
  select.symbols.cache = gpu_.view(DType::kUInt8, {1, 1});
  select.symbols.skip = gpu_.view(DType::kUInt8, {1, 1});
  select.tokens = 200;
  missing("select_flashomni", [&] { select_flashomni(select, context); });
  SummarizeArguments summary;
  summary.symbols = select.symbols;
  summary.heads = 2, summary.q_tokens = summary.kv_tokens = 200;
  summary.rows = gpu_.view(DType::kUInt8, {1, 1});
  summary.shares = gpu_.view(DType::kFloat32, {2, 2});
  summary.awake = gpu_.view(DType::kUInt8, {1});
  missing("summarize_symbols", [&] { summarize_symbols(summary, context); });
  NormRopeArguments norm;
  norm.x = mean.x;
  norm.cos = gpu_.view(DType::kFloat32, {100, 64});
  norm.sin = gpu_.view(DType::kFloat32, {100, 64});
  norm.tokens = 100;
  missing("norm_rope", [&] { norm_rope(norm, context); });
  NormRopeMeanArguments both;
  both.rows = norm, both.mean = mean.out;
  missing("norm_rope_mean", [&] { norm_rope_mean(both, context); });
  TaylorUpdateArguments taylor;
  taylor.feature = update.out;
  taylor.derivatives[0] = update.cached[0];
  missing("taylor_update", [&] { taylor_update(taylor, context); });
  TaylorForecastArguments forecast;
  forecast.derivatives[0] = update.cached[0];
  forecast.coefficients = dispatch.coefficients;
  forecast.out = update.out;
  missing("taylor_forecast", [&] { taylor_forecast(forecast, context); });
  QuantizeArguments quantize;
  quantize.x = update.out;
  quantize.values = gpu_.view(DType::kUInt8, {1, 100, 32});
  quantize.scales = gpu_.view(DType::kFloat32, {1, 100, 1});
  missing("quantize_fp8", [&] { quantize_fp8(quantize, context); });
}

}  // namespace
}  // namespace flashomni
