// Tensor maps: how bulk copies see a [batch, token, head, column] tensor of 16-bit floats, with any strides
// over batch, token and head.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "flashomni/tensor.h"

namespace flashomni::cuda::sm90 {

/// Strides in elements; the columns are contiguous.
struct MapView {
  void* data;
  DType dtype;
  int64_t batch, tokens, heads, columns;
  int64_t batch_stride, token_stride, head_stride;
};

/// A map whose box is `box_rows` tokens by 64 columns, the panel that the 128-byte swizzle and wgmma want.
/// Columns and tokens past the end read as zeros and are not written. Throws where the hardware cannot:
/// `argument` names the tensor.
CUtensorMap make_tensor_map(const MapView& view, int box_rows, const char* argument);

/// The same of columns that are whole panels, as [batch, token, head, panel, 64]: a box is `box_panels`
/// panels, one after the other.
CUtensorMap make_panel_map(const MapView& view, int box_rows, int box_panels, const char* argument);

}  // namespace flashomni::cuda::sm90
