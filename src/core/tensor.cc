#include "flashomni/tensor.h"

#include "flashomni/error.h"

namespace flashomni {

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kUInt8:
      break;
  }
  return 1;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kUInt8:
      break;
  }
  return "uint8";
}

std::string name_of(Device device) {
  if (device.type == DeviceType::kCPU) return "cpu";
  return text("cuda:", device.id);
}

std::string describe(const TensorView& view) {
  if (!view.present()) return "nothing";
  std::string result = text(name_of(view.dtype), "[");
  for (int i = 0; i < view.ndim; ++i) result += text(i == 0 ? "" : ", ", view.shape[i]);
  return result + "]";
}

TensorView make_view(void* data, DType dtype, std::initializer_list<int64_t> shape, Device device) {
  if (shape.size() > kMaxDims) {
    fail(ErrorKind::kValue, "shape", text("at most ", kMaxDims, " dimensions"), text(shape.size()));
  }
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.device = device;
  view.ndim = 0;
  for (const int64_t extent : shape) view.shape[view.ndim++] = extent;
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

namespace detail {
namespace {

DType dtype_from_dlpack(int code, int bits, int lanes, const char* argument) {
  // DLPack's DLDataTypeCode.
  constexpr int kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4;
  if (lanes == 1) {
    if (code == kFloat && bits == 32) return DType::kFloat32;
    if (code == kFloat && bits == 16) return DType::kFloat16;
    if (code == kBfloat && bits == 16) return DType::kBFloat16;
    if (code == kUInt && bits == 8) return DType::kUInt8;
    if (code == kInt && bits == 32) return DType::kInt32;
  }
  static constexpr const char* kNames[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  std::string got = code >= 0 && code <= 6 ? text(kNames[code], bits)
                                           : text("DLPack type code ", code, " of ", bits, " bits");
  if (lanes != 1) got += text(" in ", lanes, " lanes");
  fail(ErrorKind::kType, argument, "float32, float16, bfloat16, uint8 or int32", got);
}

}  // namespace

TensorView make_from_dlpack(void* data, int code, int bits, int lanes, int device_type, int device_id,
                            int ndim, const int64_t* shape, const int64_t* strides, uint64_t byte_offset,
                            const char* argument) {
  TensorView view;
  view.dtype = dtype_from_dlpack(code, bits, lanes, argument);
  if (device_type != static_cast<int>(DeviceType::kCPU) &&
      device_type != static_cast<int>(DeviceType::kCUDA)) {
    fail(ErrorKind::kType, argument, "a CPU or CUDA tensor", text("DLPack device type ", device_type));
  }
  view.device.type = static_cast<DeviceType>(device_type);
  view.device.id = view.device.type == DeviceType::kCPU ? 0 : device_id;  // there is one CPU
  if (ndim < 0 || ndim > kMaxDims) {
    fail(ErrorKind::kValue, argument, text("at most ", kMaxDims, " dimensions"), text(ndim));
  }
  view.ndim = ndim;
  int64_t compact = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] < 0) fail(ErrorKind::kValue, argument, "a shape without negative extents", text(shape[i]));
    view.shape[i] = shape[i];
    view.strides[i] = strides == nullptr ? compact : strides[i];
    compact *= shape[i];
  }
  view.data = data == nullptr ? nullptr : static_cast<char*>(data) + byte_offset;
  return view;
}

}  // namespace detail
}  // namespace flashomni
