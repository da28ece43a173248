// What every launch on Hopper needs of the host: errors, facts about a device, things done once a device.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <mutex>

#include "flashomni/error.h"

namespace flashomni::cuda::sm90 {

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

/// Streaming multiprocessors of a device, asked once.
inline int multiprocessors(int device) {
  static PerDevice asked;
  static std::array<int, kMaxDevices> counts;
  asked.once(device, [device] {
    check_cuda(cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
  });
  return counts[device];
}

}  // namespace flashomni::cuda::sm90
