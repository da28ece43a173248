// Plugins as Python sees them: it finds and builds them, and loads them by path.
#include "flashomni/plugin.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/string.h>

#include <string>

#include "convert.h"

namespace flashomni::bindings {
namespace {

namespace ffi = tvm::ffi;

// A plugin beside this library may be of older sources: python/flashomni/jit looks first.
[[maybe_unused]] const bool python_finds_plugins = (set_plugin_search(false), true);

ffi::String load_plugin(ffi::String path) {
  return guarded([&] { return ffi::String(flashomni::load_plugin(std::string(path))); });
}

/// One plugin: name, path, sources.
using PluginRow = ffi::Tuple<ffi::String, ffi::String, ffi::String>;

ffi::Array<PluginRow> loaded_plugins() {
  return guarded([] {
    ffi::Array<PluginRow> rows;
    for (const LoadedPlugin& plugin : flashomni::loaded_plugins()) {
      rows.push_back(
          PluginRow(ffi::String(plugin.name), ffi::String(plugin.path), ffi::String(plugin.sources)));
    }
    return rows;
  });
}

/// The name of the backend that serves a CUDA device; throws with the reasons if none does.
ffi::String cuda_backend(int64_t id) {
  return guarded(
      [&] { return ffi::String(backend_for(Device{DeviceType::kCUDA, narrow(id, "device")}).name); });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_plugin, load_plugin);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(loaded_plugins, loaded_plugins);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_backend, cuda_backend);

}  // namespace flashomni::bindings
