// The plugin of backend cuda_sm90: which devices it serves, and its operators behind the C border.
#include "flashomni/plugin.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <exception>

#include "src/cuda/common/elementwise.h"
#include "src/cuda/common/select/select.h"
#include "src/cuda/sm90/attention/attention.h"
#include "src/cuda/sm90/gemm/gemm.h"
#include "src/cuda/sm90/launch.h"

#ifndef FLASHOMNI_SOURCES
#define FLASHOMNI_SOURCES ""
#endif

namespace flashomni::cuda::sm90 {
namespace {

int32_t refuse(PluginStatus* status, ErrorKind kind, const std::string& message) {
  status->kind = kind;
  const size_t length = std::min(message.size(), sizeof(status->message) - 1);
  std::memcpy(status->message, message.data(), length);
  status->message[length] = '\0';
  return 1;
}

/// Runs `body`; what it throws becomes the status.
template <class Body>
int32_t guarded(PluginStatus* status, Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const Error& error) {
    return refuse(status, error.kind(), error.what());
  } catch (const std::exception& error) {
    return refuse(status, ErrorKind::kRuntime, error.what());
  }
}

/// Makes a device current, and puts back what was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device_ != before_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

template <auto kRun, auto kDeviceOf, class Arguments>
int32_t run(const Arguments* arguments, const Context* context, PluginStatus* status) {
  return guarded(status, [&] {
    const DeviceGuard guard(kDeviceOf(*arguments));
    kRun(*arguments, *context);
  });
}

template <auto kBytes, auto kDeviceOf, class Arguments>
int32_t workspace(const Arguments* arguments, const Context* context, size_t* bytes, PluginStatus* status) {
  return guarded(status, [&] {
    const DeviceGuard guard(kDeviceOf(*arguments));
    *bytes = kBytes(*arguments, *context);
  });
}

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void check_serves(int device) {
  const auto unserved = [](const std::string& reason) { throw Error(ErrorKind::kNotImplemented, reason); };
  int driver = 0, runtime = 0, devices = 0, major = 0, minor = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  if (driver == 0) unserved("no NVIDIA driver is installed");
  if (driver / 1000 < runtime / 1000) {
    unserved("the NVIDIA driver is too old: it goes up to CUDA " + cuda_version(driver) +
             ", and the plugin was built with CUDA " + cuda_version(runtime) +
             "; a driver of 580 or newer will do");
  }
  check_cuda(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  if (device < 0 || device >= devices) unserved("there are " + std::to_string(devices) + " CUDA devices");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "cudaDeviceGetAttribute");
  if (major != 9 || minor != 0) {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    unserved("serves compute capability 9.0 (H100, H200), and " + std::string(properties.name) + " is " +
             std::to_string(major) + "." + std::to_string(minor));
  }
}

int32_t serves(int32_t device, PluginStatus* status) {
  const int32_t refused = guarded(status, [&] { check_serves(device); });
  if (refused != 0) cudaGetLastError();  // the runtime's memory of it is not for the next caller
  return refused;
}

int device_of_attention(const AttentionArguments& arguments) {
  return arguments.q.device.id;
}
int device_of_means(const SelectArguments& arguments) {
  return arguments.q_mean.device.id;
}
int device_of_symbols(const SummarizeArguments& arguments) {
  return arguments.symbols.cache.device.id;
}
int device_of_mean(const NormRopeMeanArguments& arguments) {
  return arguments.mean.device.id;
}
template <class Arguments>
int device_of_x(const Arguments& arguments) {
  return arguments.x.device.id;
}
template <class Arguments>
int device_of_derivatives(const Arguments& arguments) {
  return arguments.derivatives[0].device.id;
}

template <class Arguments>
int device_of_gemm(const Arguments& arguments) {
  return arguments.out.device.id;
}

PluginTable make_table() {
  PluginTable table{};
  table.abi = kPluginAbi;
  table.bytes = sizeof(PluginTable);
  table.name = "cuda_sm90";
  // The mark lets the digest be found in the file without loading it.
  table.sources = "flashomni-sources-sha256:" FLASHOMNI_SOURCES;
  table.serves = serves;
  table.attention_workspace = workspace<attention_workspace, device_of_attention, AttentionArguments>;
  table.attention = run<attention, device_of_attention, AttentionArguments>;
  table.gemm_q_workspace = workspace<gemm_q_workspace, device_of_gemm<GemmQArguments>, GemmQArguments>;
  table.gemm_q = run<gemm_q, device_of_gemm<GemmQArguments>, GemmQArguments>;
  table.gemm_o_update_workspace =
      workspace<gemm_o_update_workspace, device_of_gemm<GemmOUpdateArguments>, GemmOUpdateArguments>;
  table.gemm_o_update = run<gemm_o_update, device_of_gemm<GemmOUpdateArguments>, GemmOUpdateArguments>;
  table.gemm_o_dispatch_workspace =
      workspace<gemm_o_dispatch_workspace, device_of_gemm<GemmODispatchArguments>, GemmODispatchArguments>;
  table.gemm_o_dispatch = run<gemm_o_dispatch, device_of_gemm<GemmODispatchArguments>, GemmODispatchArguments>;
  table.block_mean = run<block_mean, device_of_x<BlockMeanArguments>, BlockMeanArguments>;
  table.select_flashomni_workspace = workspace<select_workspace, device_of_means, SelectArguments>;
  table.select_flashomni = run<select, device_of_means, SelectArguments>;
  table.summarize_symbols = run<summarize, device_of_symbols, SummarizeArguments>;
  table.norm_rope = run<norm_rope, device_of_x<NormRopeArguments>, NormRopeArguments>;
  table.norm_rope_mean = run<norm_rope_mean, device_of_mean, NormRopeMeanArguments>;
  table.ada_layer_norm = run<ada_layer_norm, device_of_x<AdaLayerNormArguments>, AdaLayerNormArguments>;
  table.taylor_update = run<taylor_update, device_of_derivatives<TaylorUpdateArguments>, TaylorUpdateArguments>;
  table.taylor_forecast =
      run<taylor_forecast, device_of_derivatives<TaylorForecastArguments>, TaylorForecastArguments>;
  table.quantize_fp8 = run<quantize_fp8, device_of_x<QuantizeArguments>, QuantizeArguments>;
  return table;
}

}  // namespace
}  // namespace flashomni::cuda::sm90

extern "C" __attribute__((visibility("default"))) const flashomni::PluginTable* flashomni_plugin() {
  static const flashomni::PluginTable table = flashomni::cuda::sm90::make_table();
  return &table;
}
