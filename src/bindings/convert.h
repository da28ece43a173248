// From what tvm-ffi hands over to what the C++ API takes, and back for errors.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/tvm_ffi.h>

#include <array>
#include <limits>
#include <utility>

#include "flashomni/backend.h"
#include "flashomni/error.h"
#include "flashomni/forecast.h"
#include "flashomni/tensor.h"

namespace flashomni::bindings {

using Tensor = DLTensor*;
using OptionalTensor = tvm::ffi::Optional<DLTensor*>;

/// A view that is safe to read: fake and wrapped tensors, which can arrive without memory, are refused here.
inline TensorView view(Tensor tensor, const char* argument) {
  const TensorView result = from_dlpack(*tensor, argument);
  if (result.data == nullptr && result.numel() > 0) {
    fail(ErrorKind::kValue, argument, "a tensor with memory", text(describe(result), " without any"));
  }
  return result;
}

inline TensorView view(const OptionalTensor& tensor, const char* argument) {
  return tensor.has_value() ? view(*tensor, argument) : TensorView{};
}

/// The tensors that are there, counted from the first; they take the place of a list, which costs more to
/// pass.
using OrderedTensors = std::array<OptionalTensor, kMaxOrder + 1>;

inline int32_t view_all(const OrderedTensors& tensors, const char* argument,
                        std::array<TensorView, kMaxOrder + 1>* views) {
  int32_t count = 0;
  while (count <= kMaxOrder && tensors[count].has_value()) {
    (*views)[count] = view(tensors[count], argument);
    ++count;
  }
  return count;
}

inline int32_t narrow(int64_t value, const char* argument) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    fail(ErrorKind::kValue, argument, "a 32-bit integer", text(value));
  }
  return static_cast<int32_t>(value);
}

/// Runs `body`, turning the library's errors into the Python exception of their kind.
template <class Body>
auto guarded(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw tvm::ffi::Error(error.kind_name(), error.what(), "");
  }
}

/// The context of a call on the device of `tensor`. `setting`: on the CPU the threads; on a GPU the address
/// of the context's counter, or 0.
inline Context make_context(Tensor tensor, int64_t setting) {
  Context context;
  if (tensor->device.device_type == kDLCPU) {
    context.threads = narrow(setting, "threads");
  } else {
    context.counter = reinterpret_cast<int32_t*>(setting);
    context.stream = TVMFFIEnvGetStream(tensor->device.device_type, tensor->device.device_id);
  }
  return context;
}

/// Runs an operator if `workspace` is large enough and returns 0; else does nothing and returns the bytes
/// needed. So one call does in the common case, and a call without a workspace asks for its size.
template <class Arguments>
int64_t run_within(const Arguments& arguments, Context context, const OptionalTensor& workspace,
                   size_t (*bytes_needed)(const Arguments&, const Context&),
                   void (*run)(const Arguments&, const Context&)) {
  if (!workspace.has_value()) return static_cast<int64_t>(bytes_needed(arguments, context));
  const TensorView bytes = view(workspace, "workspace");
  if (bytes.dtype != DType::kUInt8 || bytes.ndim != 1 || (bytes.numel() > 1 && bytes.strides[0] != 1)) {
    fail(ErrorKind::kValue, "workspace", "contiguous uint8[bytes]", describe(bytes));
  }
  context.workspace = bytes.data;
  context.workspace_bytes = static_cast<size_t>(bytes.numel());
  // Not asked before, since that would check all arguments twice at every call.
  try {
    run(arguments, context);
    return 0;
  } catch (const WorkspaceError& error) {
    return static_cast<int64_t>(error.needed());
  }
}

}  // namespace flashomni::bindings
