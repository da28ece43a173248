// A plugin's table of C functions, as a row of the backend table.
#include "flashomni/plugin.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <type_traits>

#include "flashomni/ada_layer_norm.h"
#include "flashomni/attention.h"
#include "flashomni/forecast.h"
#include "flashomni/gemm.h"
#include "flashomni/select.h"
#include "src/core/plugin.h"

namespace flashomni {
namespace {

/// What plugins read in place must have the same layout on both sides.
template <class... Structs>
inline constexpr bool kPlain =
    ((std::is_standard_layout_v<Structs> && std::is_trivially_copyable_v<Structs>) && ...);
static_assert(kPlain<PluginTable, PluginStatus, Context, AttentionArguments, GemmQArguments,
                     GemmOUpdateArguments, GemmODispatchArguments, BlockMeanArguments, SelectArguments,
                     SummarizeArguments, NormRopeArguments, NormRopeMeanArguments, AdaLayerNormArguments,
                     TaylorUpdateArguments, TaylorForecastArguments, QuantizeArguments>);

constexpr int kMaxDevices = 64;

/// A row that a plugin may fill, once.
struct Slot {
  const char* name;
  std::atomic<const PluginTable*> table{nullptr};
  std::array<std::atomic<bool>, kMaxDevices> served{};  // devices that are known to be served
  std::string path{};                                   // guarded by loading
};

Slot sm90{.name = "cuda_sm90"};
Slot* const kSlots[] = {&sm90};
std::mutex loading;
std::atomic<bool> searching{true};

[[noreturn]] void refuse(const std::string& path, const std::string& expected, const std::string& got) {
  fail(ErrorKind::kRuntime, text("plugin ", path), expected, got);
}

std::string load_error() {
  const char* error = dlerror();
  return error == nullptr ? "an error without a message" : error;
}

/// The file's table, checked.
const PluginTable* open_plugin(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) refuse(path, "a library that can be loaded", load_error());
  const auto entry = reinterpret_cast<const PluginTable* (*)()>(dlsym(library, "flashomni_plugin"));
  if (entry == nullptr) {
    dlclose(library);
    refuse(path, "a FlashOmni plugin", "a library without the symbol flashomni_plugin");
  }
  const PluginTable* table = entry();
  std::string wrong;
  if (table == nullptr) {
    wrong = "none";
  } else if (table->abi != kPluginAbi) {
    wrong = text("version ", table->abi, ": build it from the same sources as this library");
  } else if (table->bytes != sizeof(PluginTable)) {
    wrong = text("one of ", table->bytes, " bytes in place of ", sizeof(PluginTable));
  } else if (table->name == nullptr || table->sources == nullptr || table->serves == nullptr) {
    wrong = "one without name, sources or serves()";
  }
  if (!wrong.empty()) {
    dlclose(library);
    refuse(path, text("a function table of version ", kPluginAbi), wrong);
  }
  return table;
}

bool is_file(const std::string& path) {
  struct stat found;
  return stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode);
}

/// Where a row's plugin is looked for, in order.
std::vector<std::string> search_paths(const char* name) {
  std::vector<std::string> paths;
  const std::string file = text("/libflashomni_", name, ".so");
  if (const char* folders = std::getenv("FLASHOMNI_PLUGIN_PATH")) {
    std::istringstream list(folders);
    for (std::string folder; std::getline(list, folder, ':');) {
      if (!folder.empty()) paths.push_back(folder + file);
    }
  }
  Dl_info here;
  if (dladdr(reinterpret_cast<void*>(&load_plugin), &here) != 0 && here.dli_fname != nullptr) {
    const std::string library = here.dli_fname;
    const size_t slash = library.rfind('/');
    paths.push_back((slash == std::string::npos ? "." : library.substr(0, slash)) + file);
  }
  return paths;
}

/// Loads the row's plugin if it can be found; else says what to do.
bool find_plugin(const Slot& slot, std::string* reason) {
  if (searching) {
    for (const std::string& path : search_paths(slot.name)) {
      if (!is_file(path)) continue;
      try {
        load_plugin(path);
        return slot.table != nullptr;
      } catch (const Error& error) {
        if (reason != nullptr) *reason = error.what();
        return false;
      }
    }
  }
  if (reason != nullptr) {
    *reason = text(
        "its plugin is not loaded: call flashomni.warmup() in Python, or in C++ load_plugin(path), or "
        "put the folder of libflashomni_",
        slot.name, ".so into FLASHOMNI_PLUGIN_PATH");
  }
  return false;
}

bool serves(Slot& slot, Device device, std::string* reason) {
  if (device.type != DeviceType::kCUDA) {
    if (reason != nullptr) *reason = "serves CUDA tensors only";
    return false;
  }
  const bool counted = device.id >= 0 && device.id < kMaxDevices;
  if (reason == nullptr && counted && slot.served[device.id].load(std::memory_order_acquire)) return true;
  if (slot.table == nullptr && !find_plugin(slot, reason)) return false;
  PluginStatus status;
  if (slot.table.load()->serves(device.id, &status) != 0) {
    if (reason != nullptr) *reason = status.message;
    return false;
  }
  if (counted) slot.served[device.id].store(true, std::memory_order_release);
  return true;
}

/// The row's operator. Only called after serves() said yes.
template <class Entry>
Entry entry_of(const Slot& slot, Entry PluginTable::* member, const char* name) {
  const Entry entry = slot.table.load(std::memory_order_acquire)->*member;
  if (entry == nullptr) {
    fail(ErrorKind::kNotImplemented, name, "an operator that the backend of its tensors has",
         text(slot.name, ", which does not have it; the CPU backend does"));
  }
  return entry;
}

template <class Arguments>
size_t workspace(const Slot& slot, PluginTable::Workspace<Arguments> PluginTable::* bytes_member,
                 PluginTable::Operator<Arguments> PluginTable::* member, const char* name,
                 const Arguments& arguments, const Context& context) {
  entry_of(slot, member, name);
  const auto bytes_needed = slot.table.load(std::memory_order_acquire)->*bytes_member;
  if (bytes_needed == nullptr) return 0;
  PluginStatus status;
  size_t bytes = 0;
  if (bytes_needed(&arguments, &context, &bytes, &status) != 0) throw Error(status.kind, status.message);
  return bytes;
}

template <class Arguments>
void run(const Slot& slot, PluginTable::Operator<Arguments> PluginTable::* member, const char* name,
         const Arguments& arguments, const Context& context) {
  PluginStatus status;
  if (entry_of(slot, member, name)(&arguments, &context, &status) != 0) {
    throw Error(status.kind, status.message);
  }
}

/// Functions without state of their own, as Backend wants them: one set a slot.
template <Slot& kSlot>
struct Row {
  static bool serves(Device device, std::string* reason) { return flashomni::serves(kSlot, device, reason); }

#define FLASHOMNI_PLUGIN_OPERATOR(name, Arguments)                        \
  static void name(const Arguments& arguments, const Context& context) {  \
    run<Arguments>(kSlot, &PluginTable::name, #name, arguments, context); \
  }
#define FLASHOMNI_PLUGIN_OPERATOR_WITH_WORKSPACE(name, Arguments)                                            \
  FLASHOMNI_PLUGIN_OPERATOR(name, Arguments)                                                                 \
  static size_t name##_workspace(const Arguments& arguments, const Context& context) {                       \
    return workspace<Arguments>(kSlot, &PluginTable::name##_workspace, &PluginTable::name, #name, arguments, \
                                context);                                                                    \
  }
  FLASHOMNI_PLUGIN_OPERATOR_WITH_WORKSPACE(attention, AttentionArguments)
  FLASHOMNI_PLUGIN_OPERATOR_WITH_WORKSPACE(gemm_q, GemmQArguments)
  FLASHOMNI_PLUGIN_OPERATOR_WITH_WORKSPACE(gemm_o_update, GemmOUpdateArguments)
  FLASHOMNI_PLUGIN_OPERATOR_WITH_WORKSPACE(gemm_o_dispatch, GemmODispatchArguments)
  FLASHOMNI_PLUGIN_OPERATOR_WITH_WORKSPACE(select_flashomni, SelectArguments)
  FLASHOMNI_PLUGIN_OPERATOR(block_mean, BlockMeanArguments)
  FLASHOMNI_PLUGIN_OPERATOR(summarize_symbols, SummarizeArguments)
  FLASHOMNI_PLUGIN_OPERATOR(norm_rope, NormRopeArguments)
  FLASHOMNI_PLUGIN_OPERATOR(norm_rope_mean, NormRopeMeanArguments)
  FLASHOMNI_PLUGIN_OPERATOR(ada_layer_norm, AdaLayerNormArguments)
  FLASHOMNI_PLUGIN_OPERATOR(taylor_update, TaylorUpdateArguments)
  FLASHOMNI_PLUGIN_OPERATOR(taylor_forecast, TaylorForecastArguments)
  FLASHOMNI_PLUGIN_OPERATOR(quantize_fp8, QuantizeArguments)
#undef FLASHOMNI_PLUGIN_OPERATOR_WITH_WORKSPACE
#undef FLASHOMNI_PLUGIN_OPERATOR

  static constexpr Backend backend(const char* name) {
    return {
        .name = name,
        .device = DeviceType::kCUDA,
        .serves = serves,
        .attention_workspace = attention_workspace,
        .attention = attention,
        .gemm_q_workspace = gemm_q_workspace,
        .gemm_q = gemm_q,
        .gemm_o_update_workspace = gemm_o_update_workspace,
        .gemm_o_update = gemm_o_update,
        .gemm_o_dispatch_workspace = gemm_o_dispatch_workspace,
        .gemm_o_dispatch = gemm_o_dispatch,
        .block_mean = block_mean,
        .select_flashomni_workspace = select_flashomni_workspace,
        .select_flashomni = select_flashomni,
        .summarize_symbols = summarize_symbols,
        .norm_rope = norm_rope,
        .norm_rope_mean = norm_rope_mean,
        .ada_layer_norm = ada_layer_norm,
        .taylor_update = taylor_update,
        .taylor_forecast = taylor_forecast,
        .quantize_fp8 = quantize_fp8,
    };
  }
};

}  // namespace

const Backend& cuda_sm90_backend() {
  static const Backend backend = Row<sm90>::backend(sm90.name);
  return backend;
}

std::string load_plugin(const std::string& path) {
  const std::lock_guard lock(loading);
  for (const Slot* slot : kSlots) {
    if (slot->table != nullptr && slot->path == path) return slot->name;
  }
  const PluginTable* table = open_plugin(path);
  for (Slot* slot : kSlots) {
    if (std::string(slot->name) != table->name) continue;
    if (slot->table != nullptr && slot->table != table) {
      refuse(path, text("the first plugin of backend ", slot->name), text("a second one after ", slot->path));
    }
    if (slot->table == nullptr) slot->path = path;
    slot->table.store(table, std::memory_order_release);
    return slot->name;
  }
  refuse(path, "a backend of this library's table", table->name);
}

std::vector<LoadedPlugin> loaded_plugins() {
  const std::lock_guard lock(loading);
  std::vector<LoadedPlugin> plugins;
  for (const Slot* slot : kSlots) {
    if (const PluginTable* table = slot->table) plugins.push_back({slot->name, slot->path, table->sources});
  }
  return plugins;
}

void set_plugin_search(bool on) {
  searching = on;
}

}  // namespace flashomni
