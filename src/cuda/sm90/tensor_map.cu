#include "src/cuda/sm90/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <string>

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

}  // namespace

CUtensorMap make_tensor_map(const MapView& view, int box_rows, const char* argument) {
  constexpr int64_t kAlignment = 8;  // elements: the copy engine moves 16 bytes
  const auto stride = [&](int64_t size, int64_t elements) {
    return cuuint64_t(size == 1 ? view.columns + kAlignment - 1 & ~(kAlignment - 1) : elements) * 2;
  };
  const cuuint64_t sizes[4] = {cuuint64_t(view.columns), cuuint64_t(view.tokens), cuuint64_t(view.heads),
                               cuuint64_t(view.batch)};
  const cuuint64_t strides[3] = {stride(view.tokens, view.token_stride), stride(view.heads, view.head_stride),
                                 stride(view.batch, view.batch_stride)};
  for (const cuuint64_t bytes : strides)
    if (bytes % 16 != 0)
      throw Error(ErrorKind::kValue, std::string(argument) + ": expected strides that are multiples of " +
                                         std::to_string(kAlignment) + " elements, got " +
                                         std::to_string(static_cast<int64_t>(bytes) / 2));
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0)
    throw Error(ErrorKind::kValue, std::string(argument) + ": expected data aligned to 16 bytes");
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto type =
      view.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status = encoder()(&map, type, 4, view.data, sizes, strides, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw Error(ErrorKind::kRuntime,
                std::string(argument) + ": no tensor map for these sizes and strides (CUDA error " +
                    std::to_string(static_cast<int>(status)) + ")");
  return map;
}

}  // namespace flashomni::cuda::sm90
