// What the host's side of both GEMMs shares: maps of matrices, checks, the place of row blocks.
#pragma once

#include "flashomni/gemm.h"
#include "src/cuda/ptx/tma.cuh"
#include "src/cuda/sm90/gemm/output.cuh"
#include "src/cuda/sm90/tensor_map.h"

namespace flashomni::cuda::sm90 {

inline constexpr int64_t kWorkspaceAlignment = 256;

inline int64_t aligned(int64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

/// Columns [first, first + heads * columns) of a matrix [B, M, K] or [N, K], cut into heads.
inline CUtensorMap matrix_map(const TensorView& t, int64_t first, int64_t heads, int64_t columns,
                              int box_rows, const char* name) {
  const bool batched = t.ndim == 3;
  const MapView view{t.as<char>() + first * 2,
                     t.dtype,
                     batched ? t.size(0) : 1,
                     t.size(t.ndim - 2),
                     heads,
                     columns,
                     batched ? t.strides[0] : 0,
                     t.strides[t.ndim - 2],
                     columns};
  return make_tensor_map(view, box_rows, name);
}
inline CUtensorMap matrix_map(const TensorView& t, int box_rows, const char* name) {
  return matrix_map(t, 0, 1, t.size(t.ndim - 1), box_rows, name);
}

/// What tiles of `box_rows` rows are stored to. What fills half of the L2 cache passes through it.
inline OutputMatrix output_of(const TensorView& t, int64_t heads, int box_rows, const char* name) {
  constexpr int64_t kStays = 24 << 20;
  const int64_t columns = t.size(2) / heads;
  return {matrix_map(t, 0, heads, columns, box_rows, name),
          t.as<unsigned char>(),
          t.strides[0] * 2,
          t.strides[1] * 2,
          t.numel() * 2 <= kStays ? ptx_ops::kEvictNormal : ptx_ops::kEvictFirst,
          static_cast<int>(t.size(1)),
          static_cast<int>(columns)};
}

/// Row blocks of the joint sequence that a matrix of `rows` rows touches.
struct RowBlocks {
  int first, count;
  RowBlocks(const TileSymbols& tiles, int64_t rows)
      : first(static_cast<int>(tiles.row_offset / tiles.block_q)),
        count(static_cast<int>((tiles.row_offset + rows - 1) / tiles.block_q - first + 1)) {}
};

/// A weight that fits the L2 cache beside what streams through it stays there.
inline uint64_t weight_policy(const TensorView& weight) {
  constexpr int64_t kStays = 24 << 20;
  return weight.numel() * 2 <= kStays ? ptx_ops::kEvictLast : ptx_ops::kEvictNormal;
}

inline void check_size(int64_t size, const char* name) {
  constexpr int64_t kMost = 1 << 30;
  if (size >= kMost)
    throw Error(ErrorKind::kNotImplemented,
                text(name, ": expected sizes below 2^30 (cuda_sm90), got ", size));
}
inline void check_sizes(const TensorView& t, const char* name) {
  for (int i = 0; i < t.ndim; ++i) check_size(t.size(i), name);
}

}  // namespace flashomni::cuda::sm90
