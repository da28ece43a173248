// Plugins: backends in libraries of their own, loaded when first needed. GPU backends are built apart from
// this library, by nvcc, at install or at first use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "flashomni/backend.h"
#include "flashomni/error.h"
#include "flashomni/export.h"

namespace flashomni {

/// Counts up whenever PluginTable, Context or an operator's arguments change.
inline constexpr uint32_t kPluginAbi = 10;

/// Why a plugin refused. No exception and no object that owns memory crosses into or out of a plugin.
struct PluginStatus {
  ErrorKind kind;
  char message[1024];  ///< ends with a 0
};

/// What a plugin exports: extern "C" const flashomni::PluginTable* flashomni_plugin().
///
/// Arguments come in checked. Functions return 0, or fill the status and return 1. A null operator is one
/// that the backend does not have; a null workspace function means no workspace.
struct PluginTable {
  template <class Arguments>
  using Workspace = int32_t (*)(const Arguments*, const Context*, size_t* bytes, PluginStatus*);
  template <class Arguments>
  using Operator = int32_t (*)(const Arguments*, const Context*, PluginStatus*);

  uint32_t abi;         ///< kPluginAbi; the first field in every version
  uint32_t bytes;       ///< sizeof(PluginTable)
  const char* name;     ///< its row in the backend table
  const char* sources;  ///< what it was built from: a digest, or ""
  /// 0 if it serves this CUDA device; else the status says why not.
  int32_t (*serves)(int32_t device_id, PluginStatus*);

  Workspace<AttentionArguments> attention_workspace;
  Operator<AttentionArguments> attention;
  Workspace<GemmQArguments> gemm_q_workspace;
  Operator<GemmQArguments> gemm_q;
  Workspace<GemmOUpdateArguments> gemm_o_update_workspace;
  Operator<GemmOUpdateArguments> gemm_o_update;
  Workspace<GemmODispatchArguments> gemm_o_dispatch_workspace;
  Operator<GemmODispatchArguments> gemm_o_dispatch;
  Operator<BlockMeanArguments> block_mean;
  Workspace<SelectArguments> select_flashomni_workspace;
  Operator<SelectArguments> select_flashomni;
  Operator<SummarizeArguments> summarize_symbols;
  Operator<NormRopeArguments> norm_rope;
  Operator<NormRopeMeanArguments> norm_rope_mean;
  Operator<AdaLayerNormArguments> ada_layer_norm;
  Operator<TaylorUpdateArguments> taylor_update;
  Operator<TaylorForecastArguments> taylor_forecast;
  Operator<QuantizeArguments> quantize_fp8;
};

/// Loads a plugin for the rest of the process and returns its backend's name. Loading the same file again
/// does nothing. Throws RuntimeError if the file cannot be loaded, is no plugin, is of another version, is of
/// no row of the table, or if its row is taken by another file.
FLASHOMNI_API std::string load_plugin(const std::string& path);

struct LoadedPlugin {
  std::string name, path, sources;
};
FLASHOMNI_API std::vector<LoadedPlugin> loaded_plugins();

/// While no plugin is loaded, the first CUDA tensor makes its backend look for libflashomni_<backend>.so in
/// the folders of FLASHOMNI_PLUGIN_PATH (a list with colons), then in the folder of this library. False: only
/// load_plugin() loads.
FLASHOMNI_API void set_plugin_search(bool on);

}  // namespace flashomni
