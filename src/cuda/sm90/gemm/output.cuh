// A matrix that tiles are stored to. The copy engine clips a box that ends past the matrix, but must not be
// given one that begins before it (CUDA's programming guide, "out-of-bound" of bulk tensor copies): the row
// block in which the matrix begins is stored row by row.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "src/cuda/ptx/control.cuh"
#include "src/cuda/ptx/tma.cuh"

namespace flashomni::cuda::sm90 {

struct OutputMatrix {
  CUtensorMap map;  // [batch, rows, heads, columns]; a copy ends with its head
  unsigned char* data;
  int64_t batch_bytes, row_bytes;
  uint64_t policy;    // of the L2 cache
  int rows, columns;  // columns: of a head

  /// Called by a whole warp: `box_rows` rows from start.row on of 64 columns, which lie swizzled at `staged`.
  __device__ void store(const unsigned char* staged, int box_rows, ptx_ops::BoxStart start,
                        bool leader) const {
    if (start.row >= 0) {
      if (leader) ptx_ops::tma_store(&map, ptx_ops::shared_address(staged), start, policy);
    } else {
      store_rows(staged, box_rows, start);
    }
  }

 private:
  __device__ void store_rows(const unsigned char* staged, int box_rows, ptx_ops::BoxStart start) const {
    const int lane = ptx_ops::lane_index(), column = start.column + lane % 8 * 8;  // 8 lanes a row
    if (column >= columns) return;
    unsigned char* to = data + start.batch * batch_bytes + (int64_t(start.head) * columns + column) * 2;
    const int end = min(box_rows, rows - start.row);
    for (int r = -start.row + lane / 8; r < end; r += 4) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(staged + r * 128 + ((lane % 8) ^ (r % 8)) * 16);
      unsigned char* row = to + (start.row + r) * row_bytes;
      if (column + 8 <= columns) {
        *reinterpret_cast<uint4*>(row) = chunk;
        continue;
      }
      const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < columns)
          reinterpret_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
    }
  }
};

}  // namespace flashomni::cuda::sm90
