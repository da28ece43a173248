// The sparse linear layers. The weight is packed once a call, a group of output columns at a time; then
// threads take (row block, column group) tiles as they come free, and a tile multiplies only its active
// stretches of k.
#pragma once

#include <omp.h>

#include <type_traits>

#include "src/cpu/kernels.h"
#include "src/cpu/panel.h"
#include "src/cpu/workspace.h"

namespace flashomni::cpu {
namespace FLASHOMNI_ISA {
namespace {

constexpr int64_t kDepth = 384;         // k elements of A that pass through the caches at a time
constexpr int64_t kGroupColumns = 128;  // output columns a tile

/// How the output's columns are cut. A group never spans two heads of GEMM-Q.
struct ColumnGroups {
  int64_t columns, head_columns, per_head;
  ColumnGroups(int64_t columns, int64_t heads)
      : columns(columns), head_columns(columns / heads), per_head(ceil_div(head_columns, kGroupColumns)) {}
  int64_t count() const { return columns / head_columns * per_head; }
  int64_t head(int64_t group) const { return group / per_head; }
  int64_t first(int64_t group) const { return head(group) * head_columns + group % per_head * kGroupColumns; }
  int64_t width(int64_t group) const {
    return at_most(kGroupColumns, head_columns - group % per_head * kGroupColumns);
  }
  int64_t widest() const { return at_most(kGroupColumns, head_columns); }
};

/// Which rows of the matrix lie in which row block of the joint sequence.
struct RowBlocks {
  int64_t rows, offset, block;
  RowBlocks(const TileSymbols& tiles, int64_t rows)
      : rows(rows), offset(tiles.row_offset), block(tiles.block_q) {}
  int64_t first_block() const { return offset / block; }
  int64_t count() const { return rows == 0 ? 0 : (offset + rows - 1) / block - first_block() + 1; }
  int64_t begin(int64_t i) const { return at_least(0, (first_block() + i) * block - offset); }
  int64_t end(int64_t i) const { return at_most(rows, (first_block() + i + 1) * block - offset); }
};

/// The packed weight: panel p of group g holds its kPanel columns for the whole of k.
template <class Units>
struct PackedWeight {
  Unit* data;
  int64_t k_units, group_stride;

  PackedWeight(Arena& arena, const ColumnGroups& groups, int64_t k) {
    k_units = units<Units>(k);
    group_stride = padded(groups.widest()) * k_units;
    data = arena.take<Unit>(groups.count() * group_stride);
  }
  int64_t panel_stride() const { return k_units * kPanel; }
  const Unit* at(int64_t group, int64_t k) const {
    return data + group * group_stride + k / Units::kElements * kPanel;
  }
  template <class T>
  void pack(const TensorView& weight, const ColumnGroups& groups, int64_t group, Unit* scratch) const {
    const T* rows = static_cast<const T*>(weight.data) + groups.first(group) * weight.strides[0];
    pack_transposed<Units>(rows, weight.strides[0], groups.width(group), weight.shape[1],
                           data + group * group_stride, panel_stride(), scratch);
  }
};

struct GemmScratch {
  Unit *slice, *transpose;
  float* sum;
  template <class Units>
  GemmScratch(Arena& arena, Units, int64_t block_rows, int64_t k) {
    slice = arena.take<Unit>(block_rows * kDepth);
    transpose = arena.take<Unit>(8 * units<Units>(k));
    sum = arena.take<float>(block_rows * padded(kGroupColumns));
  }
};

/// One tile's sum, in float32: rows of A times a column group of the weight, over chosen stretches of k.
template <class T>
class TileSum {
  using Units = typename UnitsOf<T>::type;

 public:
  TileSum(const GemmScratch& scratch, const PackedWeight<Units>& weight, int64_t group, int64_t width,
          int64_t rows)
      : scratch_(scratch), weight_(weight), group_(group), wide_(padded(width)), rows_(rows) {}

  /// Adds a[rows, k_begin..k_end) times the weight's columns k_begin.. .
  void add(const T* a, int64_t a_stride, int64_t k_begin, int64_t k_end) {
    for (int64_t k = k_begin; k < k_end; k += kDepth) {
      const int64_t depth = at_most(kDepth, k_end - k), depth_units = units<Units>(depth);
      const Unit* rows = reinterpret_cast<const Unit*>(a + k);
      int64_t stride = a_stride;
      if constexpr (!std::is_same_v<T, float>) {
        for (int64_t r = 0; r < rows_; ++r)
          Units::make(a + r * a_stride + k, depth, scratch_.slice + r * depth_units);
        rows = scratch_.slice;
        stride = depth_units;
      }
      multiply<Units>(rows, stride, rows_, weight_.at(group_, k), weight_.panel_stride(), wide_ / kPanel,
                      depth_units, scratch_.sum, wide_, begun_);
      begun_ = true;
    }
  }

  /// The sum's rows; zeros if nothing was added.
  float* row(int64_t r) {
    if (!begun_) {
      std::memset(scratch_.sum, 0, static_cast<size_t>(rows_ * wide_) * sizeof(float));
      begun_ = true;
    }
    return scratch_.sum + r * wide_;
  }

 private:
  const GemmScratch& scratch_;
  const PackedWeight<Units>& weight_;
  int64_t group_, wide_, rows_;
  bool begun_ = false;
};

template <class T>
inline T* row_of(const TensorView& view, int64_t batch, int64_t row, int64_t column) {
  return static_cast<T*>(view.data) + batch * view.strides[0] + row * view.strides[1] + column;
}

template <class T>
inline void add_bias(float* row, const TensorView& bias, int64_t first, int64_t width) {
  if (bias.ndim < 0) return;
  const T* values = static_cast<const T*>(bias.data) + first;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(row + i, load(row + i) + load_as_float(values + i));
  for (; i < width; ++i) row[i] += to_float(values[i]);
}

inline Float erf_of(Float x) {
  // Abramowitz and Stegun 7.1.26 with its exponential; absolute error under 1.5e-7.
  Int sign;
  std::memcpy(&sign, &x, sizeof sign);
  const Int magnitude = sign & 0x7FFFFFFF;
  sign &= INT32_MIN;
  Float z;
  std::memcpy(&z, &magnitude, sizeof z);
  const Float t = 1.0f / (z * 0.3275911f + 1.0f);
  const Float p =
      ((((t * 1.061405429f - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  Float y = 1.0f - p * exp2_of(z * z * -1.44269504f);
  Int bits;
  std::memcpy(&bits, &y, sizeof bits);
  bits |= sign;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline Float activate(Float x, Activation activation) {
  if (activation == Activation::kGelu) return x * 0.5f * (erf_of(x * 0.70710678f) + 1.0f);
  // gelu_tanh(x) = x / (1 + 2^(-2 log2(e) sqrt(2 / pi) (x + 0.044715 x^3)))
  const Float inner = x * (x * x * 0.044715f + 1.0f) * -2.30220820f;
  return x / (exp2_of(maximum(splat(-126.0f), inner > 126.0f ? splat(126.0f) : inner)) + 1.0f);
}

inline void activate_row(float* row, int64_t width, Activation activation) {
  if (activation == Activation::kNone) return;
  for (int64_t i = 0; i < padded(width); i += kLanes) store(row + i, activate(load(row + i), activation));
}

/// Packs the weight and runs `tile(scratch, weight, batch, row block, group)` for every tile, in one parallel
/// region. `wanted(group)`: whether any tile needs that group.
template <class T, class Wanted, class Run>
inline void for_tiles(const TensorView& weight_view, const ColumnGroups& groups, const RowBlocks& blocks,
                      int64_t batch, void* workspace, int threads, Wanted&& wanted, Run&& run) {
  using Units = typename UnitsOf<T>::type;
  const int64_t k = weight_view.shape[1];
  Arena shared(workspace);
  const PackedWeight<Units> weight(shared, groups, k);
  Arena measure(nullptr);
  GemmScratch(measure, Units{}, blocks.block, k);
  const size_t per_thread = measure.used();
  const int64_t row_blocks = blocks.count(), tiles = batch * row_blocks * groups.count();
#pragma omp parallel num_threads(threads)
  {
    Arena arena(static_cast<char*>(workspace) + shared.used() +
                per_thread * static_cast<size_t>(omp_get_thread_num()));
    const GemmScratch scratch(arena, Units{}, blocks.block, k);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups.count(); ++group) {
      if (wanted(group)) weight.template pack<T>(weight_view, groups, group, scratch.transpose);
    }
    // Column groups pass slowest, so that a group's packed weight stays in the cache over the row blocks.
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) {
      run(scratch, weight, t / row_blocks % batch, t % row_blocks, t / row_blocks / batch);
    }
  }
}

template <class T>
inline size_t gemm_workspace_as(const ColumnGroups& groups, int64_t block, int64_t k, int threads) {
  using Units = typename UnitsOf<T>::type;
  Arena arena(nullptr), scratch(nullptr);
  PackedWeight<Units>(arena, groups, k);
  GemmScratch(scratch, Units{}, block, k);
  return arena.used() + scratch.used() * static_cast<size_t>(threads);
}

inline size_t gemm_workspace(const TensorView& weight, int64_t heads, int64_t block, int threads) {
  size_t bytes = 0;
  with_type(weight.dtype, [&](auto* type) {
    bytes = gemm_workspace_as<std::remove_pointer_t<decltype(type)>>(ColumnGroups(weight.shape[0], heads),
                                                                     block, weight.shape[1], threads);
  });
  return bytes;
}

/// The bit of (row block of the matrix, head).
struct TileBits {
  const TileSymbols& tiles;
  int64_t first_block;
  bool active(int64_t batch, int64_t block, int64_t head) const {
    return bit_at(element_bytes(tiles.cache, tiles.cache_indptr, batch),
                  (first_block + block) * tiles.heads + head);
  }
};

inline bool any_active(const TileBits& bits, int64_t batch, int64_t block) {
  for (int64_t h = 0; h < bits.tiles.heads; ++h) {
    if (bits.active(batch, block, h)) return true;
  }
  return false;
}

inline bool any_active(const TileBits& bits, const RowBlocks& blocks, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < blocks.count(); ++i) {
      if (any_active(bits, b, i)) return true;
    }
  }
  return false;
}

template <class T>
inline void gemm_q_as(const GemmQArguments& a, void* workspace, int threads) {
  const ColumnGroups groups(a.weight.shape[0], a.tiles.heads);
  const RowBlocks blocks(a.tiles, a.x.shape[1]);
  const TileBits bits{a.tiles, blocks.first_block()};
  const int64_t batch = a.x.shape[0];
  auto wanted = [&](int64_t group) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < blocks.count(); ++i) {
        if (bits.active(b, i, groups.head(group))) return true;
      }
    }
    return false;
  };
  for_tiles<T>(a.weight, groups, blocks, batch, workspace, threads, wanted,
               [&](const GemmScratch& scratch, const auto& weight, int64_t b, int64_t block, int64_t group) {
                 if (!bits.active(b, block, groups.head(group))) return;
                 const int64_t begin = blocks.begin(block), rows = blocks.end(block) - begin;
                 const int64_t first = groups.first(group), width = groups.width(group);
                 TileSum<T> sum(scratch, weight, group, width, rows);
                 sum.add(row_of<const T>(a.x, b, begin, 0), a.x.strides[1], 0, a.weight.shape[1]);
                 for (int64_t r = 0; r < rows; ++r) {
                   add_bias<T>(sum.row(r), a.bias, first, width);
                   activate_row(sum.row(r), width, a.activation);
                   from_floats(sum.row(r), row_of<T>(a.out, b, begin + r, first), width);
                 }
               });
}

/// Adds the heads of a row block whose bit is `wanted`, neighbours in one stretch of k.
template <class T>
inline void add_heads(TileSum<T>& sum, const TileBits& bits, int64_t batch, int64_t block, bool wanted,
                      const T* a, int64_t a_stride, int64_t head_dim) {
  const int64_t heads = bits.tiles.heads;
  for (int64_t h = 0; h < heads; ++h) {
    if (bits.active(batch, block, h) != wanted) continue;
    int64_t end = h + 1;
    while (end < heads && bits.active(batch, block, end) == wanted) ++end;
    sum.add(a, a_stride, h * head_dim, end * head_dim);
    h = end;
  }
}

/// Adds the columns past the heads: those of `past`, where there is one.
template <class T>
inline void add_past(TileSum<T>& sum, const TensorView& o, const TensorView& past, int64_t batch, int64_t row,
                     int64_t first, int64_t end) {
  const TensorView& from = past.present() ? past : o;
  const T* a = row_of<const T>(from, batch, row, 0) - (past.present() ? first : 0);
  sum.add(a, from.strides[1], first, end);
}

template <class T>
inline void gemm_o_update_as(const GemmOUpdateArguments& a, void* workspace, int threads) {
  const ColumnGroups groups(a.weight.shape[0], 1);
  const RowBlocks blocks(a.tiles, a.o[0].shape[1]);
  const TileBits bits{a.tiles, blocks.first_block()};
  for_tiles<T>(
      a.weight, groups, blocks, a.o[0].shape[0], workspace, threads, [](int64_t) { return true; },
      [&](const GemmScratch& scratch, const auto& weight, int64_t b, int64_t block, int64_t group) {
        const int64_t begin = blocks.begin(block), rows = blocks.end(block) - begin;
        const int64_t first = groups.first(group), width = groups.width(group);
        const bool caches = !a.keep_rows || any_active(bits, b, block);
        for (int32_t i = caches ? a.orders - 1 : 0; i >= 0;
             --i) {  // order 0 last: its sum goes on to the output
          TileSum<T> sum(scratch, weight, group, width, rows);
          const T* o = row_of<const T>(a.o[i], b, begin, 0);
          add_heads(sum, bits, b, block, false, o, a.o[i].strides[1], a.head_dim);
          for (int64_t r = 0; r < rows; ++r) {
            if (i == 0) add_bias<T>(sum.row(r), a.bias, first, width);
            if (caches) from_floats(sum.row(r), row_of<T>(a.cached[i], b, begin + r, first), width);
          }
          if (i > 0) continue;
          add_heads(sum, bits, b, block, true, o, a.o[0].strides[1], a.head_dim);
          add_past(sum, a.o[0], a.past, b, begin, a.tiles.heads * a.head_dim, a.weight.shape[1]);
          for (int64_t r = 0; r < rows; ++r) {
            from_floats(sum.row(r), row_of<T>(a.out, b, begin + r, first), width);
          }
        }
      });
}

template <class T>
inline void gemm_o_dispatch_as(const GemmODispatchArguments& a, void* workspace, int threads) {
  const ColumnGroups groups(a.weight.shape[0], 1);
  const RowBlocks blocks(a.tiles, a.o.shape[1]);
  const TileBits bits{a.tiles, blocks.first_block()};
  const float* coefficients = static_cast<const float*>(a.coefficients.data);
  const bool past = a.weight.shape[1] > a.tiles.heads * a.head_dim;
  const bool any = (past && !a.keep_rows) || any_active(bits, blocks, a.o.shape[0]);
  for_tiles<T>(
      a.weight, groups, blocks, a.o.shape[0], workspace, threads, [any](int64_t) { return any; },
      [&](const GemmScratch& scratch, const auto& weight, int64_t b, int64_t block, int64_t group) {
        if (a.keep_rows && !any_active(bits, b, block)) return;
        const int64_t begin = blocks.begin(block), rows = blocks.end(block) - begin;
        const int64_t first = groups.first(group), width = groups.width(group);
        TileSum<T> sum(scratch, weight, group, width, rows);
        const T* o = row_of<const T>(a.o, b, begin, 0);
        add_heads(sum, bits, b, block, true, o, a.o.strides[1], a.head_dim);
        add_past(sum, a.o, a.past, b, begin, a.tiles.heads * a.head_dim, a.weight.shape[1]);
        for (int64_t r = 0; r < rows; ++r) {
          float* row = sum.row(r);
          for (int32_t i = 0; i < a.orders; ++i) {
            const float c = coefficients[a.coefficients.strides[0] * i];
            if (c == 0.0f) continue;  // an order without history may hold anything
            const T* cached = row_of<const T>(a.cached[i], b, begin + r, first);
            int64_t j = 0;
            for (; j + kLanes <= width; j += kLanes) {
              store(row + j, load(row + j) + splat(c) * load_as_float(cached + j));
            }
            for (; j < width; ++j) row[j] += c * to_float(cached[j]);
          }
          from_floats(row, row_of<T>(a.out, b, begin + r, first), width);
        }
      });
}

inline size_t gemm_q_workspace(const GemmQArguments& a, int threads) {
  return gemm_workspace(a.weight, a.tiles.heads, a.tiles.block_q, threads);
}
inline size_t gemm_o_update_workspace(const GemmOUpdateArguments& a, int threads) {
  return gemm_workspace(a.weight, 1, a.tiles.block_q, threads);
}
inline size_t gemm_o_dispatch_workspace(const GemmODispatchArguments& a, int threads) {
  return gemm_workspace(a.weight, 1, a.tiles.block_q, threads);
}
inline void gemm_q(const GemmQArguments& a, void* workspace, int threads) {
  with_type(a.x.dtype,
            [&](auto* t) { gemm_q_as<std::remove_pointer_t<decltype(t)>>(a, workspace, threads); });
}
inline void gemm_o_update(const GemmOUpdateArguments& a, void* workspace, int threads) {
  with_type(a.out.dtype,
            [&](auto* t) { gemm_o_update_as<std::remove_pointer_t<decltype(t)>>(a, workspace, threads); });
}
inline void gemm_o_dispatch(const GemmODispatchArguments& a, void* workspace, int threads) {
  with_type(a.out.dtype,
            [&](auto* t) { gemm_o_dispatch_as<std::remove_pointer_t<decltype(t)>>(a, workspace, threads); });
}

}  // namespace
}  // namespace FLASHOMNI_ISA
}  // namespace flashomni::cpu
