#include "src/cuda/sm90/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "src/cuda/sm90/launch.h"

namespace flashomni::cuda::sm90 {
namespace {

/// The driver's function, found at run time: nothing here links to the driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    if (entry == nullptr)
      throw Error(ErrorKind::kRuntime, "cuTensorMapEncodeTiled: this driver does not have it");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encode;
}

/// One dimension of a map, fastest first; that of the columns has no stride.
struct Dimension {
  int64_t size, stride_bytes;
  int box;
};

CUtensorMap encode(const MapView& view, const std::vector<Dimension>& dimensions, const char* argument) {
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], steps[5];
  for (size_t i = 0; i < dimensions.size(); ++i) {
    sizes[i] = cuuint64_t(dimensions[i].size), box[i] = cuuint32_t(dimensions[i].box), steps[i] = 1;
    if (i > 0) strides[i - 1] = cuuint64_t(dimensions[i].stride_bytes);
  }
  CUtensorMap map;
  const auto type =
      view.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status = encoder()(&map, type, static_cast<cuuint32_t>(dimensions.size()), view.data, sizes, strides,
                                    box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error(ErrorKind::kRuntime,
                std::string(argument) + ": no tensor map for these sizes and strides (CUDA error " +
                    std::to_string(static_cast<int>(status)) + ")");
  return map;
}

/// The dimensions of tokens, heads and batch, checked.
std::vector<Dimension> outer_dimensions(const MapView& view, int box_rows, const char* argument) {
  constexpr int64_t kAlignment = 8;  // elements: the copy engine moves 16 bytes
  const auto dimension = [&](int64_t size, int64_t elements, int box) {
    // What is not walked along may have any stride.
    const int64_t stride = size == 1 ? view.columns + kAlignment - 1 & ~(kAlignment - 1) : elements;
    if (stride % kAlignment != 0)
      throw Error(ErrorKind::kValue, std::string(argument) + ": expected strides that are multiples of " +
                                         std::to_string(kAlignment) + " elements, got " + std::to_string(stride));
    return Dimension{size, stride * 2, box};
  };
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0)
    throw Error(ErrorKind::kValue, std::string(argument) + ": expected data aligned to 16 bytes");
  return {dimension(view.tokens, view.token_stride, box_rows), dimension(view.heads, view.head_stride, 1),
          dimension(view.batch, view.batch_stride, 1)};
}

}  // namespace

CUtensorMap make_tensor_map(const MapView& view, int box_rows, const char* argument) {
  const auto outer = outer_dimensions(view, box_rows, argument);
  return encode(view, {{view.columns, 0, 64}, outer[0], outer[1], outer[2]}, argument);
}

CUtensorMap make_panel_map(const MapView& view, int box_rows, int box_panels, const char* argument) {
  const auto outer = outer_dimensions(view, box_rows, argument);
  return encode(view, {{64, 0, 64}, outer[0], {view.columns / 64, 128, box_panels}, outer[1], outer[2]}, argument);
}

}  // namespace flashomni::cuda::sm90
