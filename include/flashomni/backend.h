// The backend table: which library serves which device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "flashomni/export.h"
#include "flashomni/tensor.h"

namespace flashomni {

struct AttentionArguments;
struct GemmQArguments;
struct GemmOUpdateArguments;
struct GemmODispatchArguments;
struct BlockMeanArguments;
struct SelectArguments;
struct SummarizeArguments;
struct NormRopeArguments;
struct NormRopeMeanArguments;
struct AdaLayerNormArguments;
struct TaylorUpdateArguments;
struct TaylorForecastArguments;
struct QuantizeArguments;

/// What an operator may use besides its tensors. Operators never allocate.
struct Context {
  void* workspace = nullptr;  ///< at least what the operator's *_workspace() asks for, 64-byte aligned
  size_t workspace_bytes = 0;
  /// GPU: a number in its memory that is 0 before a call and after it, or null. An operator that counts with
  /// it saves the launch that sets one to 0; calls that may run at one time must not share it.
  int32_t* counter = nullptr;
  void* stream = nullptr;  ///< CUDA stream; unused on the CPU
  int32_t threads = 0;     ///< CPU: threads to use; 0 = OpenMP's own number
};

/// One backend's operators. Arguments reach it checked.
struct Backend {
  const char* name;
  DeviceType device;
  /// True if this backend can serve `device` here; otherwise `reason`, unless null, says why not.
  bool (*serves)(Device device, std::string* reason);

  size_t (*attention_workspace)(const AttentionArguments&, const Context&);
  void (*attention)(const AttentionArguments&, const Context&);
  size_t (*gemm_q_workspace)(const GemmQArguments&, const Context&);
  void (*gemm_q)(const GemmQArguments&, const Context&);
  size_t (*gemm_o_update_workspace)(const GemmOUpdateArguments&, const Context&);
  void (*gemm_o_update)(const GemmOUpdateArguments&, const Context&);
  size_t (*gemm_o_dispatch_workspace)(const GemmODispatchArguments&, const Context&);
  void (*gemm_o_dispatch)(const GemmODispatchArguments&, const Context&);
  void (*block_mean)(const BlockMeanArguments&, const Context&);
  size_t (*select_flashomni_workspace)(const SelectArguments&, const Context&);
  void (*select_flashomni)(const SelectArguments&, const Context&);
  void (*summarize_symbols)(const SummarizeArguments&, const Context&);
  void (*norm_rope)(const NormRopeArguments&, const Context&);
  void (*norm_rope_mean)(const NormRopeMeanArguments&, const Context&);
  void (*ada_layer_norm)(const AdaLayerNormArguments&, const Context&);
  void (*taylor_update)(const TaylorUpdateArguments&, const Context&);
  void (*taylor_forecast)(const TaylorForecastArguments&, const Context&);
  void (*quantize_fp8)(const QuantizeArguments&, const Context&);
};

/// The backend for `device`: the first of the table that serves it, or the one that FLASHOMNI_BACKEND names.
/// Throws NotImplementedError that lists every backend with its reason; ValueError if FLASHOMNI_BACKEND names
/// none. Loads the plugin of a GPU backend where it can be found (plugin.h). The variable is read at each
/// call.
FLASHOMNI_API const Backend& backend_for(Device device);

/// A row of the table, for `flashomni doctor`.
struct BackendStatus {
  std::string name, device, reason;
  bool serves = false;
};
FLASHOMNI_API std::vector<BackendStatus> backend_statuses();

/// The CPU instruction set in use: "avx512bf16", "avx512", "avx2" or "generic". FLASHOMNI_CPU_ISA=name forces
/// one; ValueError if the chip lacks it.
FLASHOMNI_API const char* cpu_isa();

}  // namespace flashomni
