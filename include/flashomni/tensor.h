// Tensor views with DLPack's meaning: a pointer, a type, a device, a shape and strides in elements. They own
// nothing.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "flashomni/export.h"

namespace flashomni {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kUInt8, kInt32 };

/// Values are DLPack's DLDeviceType.
enum class DeviceType : int32_t { kCPU = 1, kCUDA = 2 };

struct Device {
  DeviceType type = DeviceType::kCPU;
  int32_t id = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxDims = 4;

/// A view of memory that somebody else keeps alive. A default-constructed view stands for an absent argument.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int32_t ndim = -1;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements

  bool present() const { return ndim >= 0; }
  int64_t size(int dim) const { return shape[dim]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

FLASHOMNI_API int64_t bytes_of(DType dtype);
FLASHOMNI_API const char* name_of(DType dtype);
FLASHOMNI_API std::string name_of(Device device);
/// "float32[2, 77, 24, 128]", for messages.
FLASHOMNI_API std::string describe(const TensorView& view);

/// A contiguous view on the CPU, for C++ callers.
FLASHOMNI_API TensorView make_view(void* data, DType dtype, std::initializer_list<int64_t> shape,
                                   Device device = {});

/// Takes over any struct laid out as DLPack's DLTensor (this header needs no dlpack.h). Throws TypeError for
/// a type or device that no operator knows, ValueError for more than kMaxDims dimensions.
template <class DLTensorLike>
TensorView from_dlpack(const DLTensorLike& tensor, const char* argument);

namespace detail {
FLASHOMNI_API TensorView make_from_dlpack(void* data, int code, int bits, int lanes, int device_type,
                                          int device_id, int ndim, const int64_t* shape,
                                          const int64_t* strides, uint64_t byte_offset, const char* argument);
}

template <class DLTensorLike>
TensorView from_dlpack(const DLTensorLike& t, const char* argument) {
  return detail::make_from_dlpack(t.data, t.dtype.code, t.dtype.bits, t.dtype.lanes,
                                  static_cast<int>(t.device.device_type), t.device.device_id, t.ndim, t.shape,
                                  t.strides, t.byte_offset, argument);
}

}  // namespace flashomni
