// What launches need of the host on any architecture: errors, facts about a device, things done once a
// device.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <string>

#include "flashomni/error.h"

namespace flashomni::cuda {

inline constexpr int kMaxDevices = 64;

/// Throws RuntimeError where a CUDA call failed.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorKind::kRuntime, std::string(what) + ": " + cudaGetErrorString(status));
}

/// Does something once for each device, safely from several threads.
class PerDevice {
 public:
  template <class Function>
  void once(int device, Function function) {
    std::call_once(flags_.at(device), function);
  }

 private:
  std::array<std::once_flag, kMaxDevices> flags_;
};

/// An attribute of a device, asked once.
template <cudaDeviceAttr kAttribute>
int device_attribute(int device) {
  static PerDevice asked;
  static std::array<int, kMaxDevices> values;
  asked.once(device, [device] {
    check_cuda(cudaDeviceGetAttribute(&values[device], kAttribute, device), "cudaDeviceGetAttribute");
  });
  return values[device];
}

/// Streaming multiprocessors of a device.
inline int multiprocessors(int device) {
  return device_attribute<cudaDevAttrMultiProcessorCount>(device);
}

}  // namespace flashomni::cuda
