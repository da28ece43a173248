// Memory-bound neighbours of attention: block means, QK norm with RoPE, adaptive norms, Taylor differences
// and forecasts.
#pragma once

#include <omp.h>

#include <type_traits>

#include "src/cpu/convert.h"
#include "src/cpu/kernels.h"
#include "src/cpu/workspace.h"

namespace flashomni::cpu {
namespace FLASHOMNI_ISA {
namespace {

constexpr int64_t kRun = 256;  // elements converted at a time, on the stack

/// 1 / |row|; 0 where it has no direction.
inline float inverse_length(const float* row, int64_t dim) {
  float squares = 0;
  for (int64_t d = 0; d < dim; ++d) squares += row[d] * row[d];
  return squares > 0 ? 1.0f / __builtin_sqrtf(squares) : 0.0f;
}

template <class T>
inline void block_mean_as(const BlockMeanArguments& a, int threads) {
  const int64_t batch = a.x.shape[0], tokens = a.x.shape[1], heads = a.x.shape[2], dim = a.x.shape[3];
  const int64_t blocks = ceil_div(tokens, a.block);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * a.block, count = at_most(a.block, tokens - first);
      float sum[kRun], units[kRun], row[kRun];  // head_dim is at most 256
      for (int64_t h = 0; h < heads; ++h) {
        std::memset(sum, 0, sizeof sum);
        std::memset(units, 0, sizeof units);
        const T* x = static_cast<const T*>(a.x.data) + b * a.x.strides[0] + first * a.x.strides[1] +
                     h * a.x.strides[2];
        for (int64_t t = 0; t < count; ++t) {
          to_floats(x + t * a.x.strides[1], row, dim);
          for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
          if (a.similarity.ndim < 0) continue;
          const float inverse = inverse_length(row, dim);
          for (int64_t d = 0; d < dim; ++d) units[d] += row[d] * inverse;
        }
        float* out = static_cast<float*>(a.out.data) + b * a.out.strides[0] + i * a.out.strides[1] +
                     h * a.out.strides[2];
        for (int64_t d = 0; d < dim; ++d) out[d] = sum[d] / static_cast<float>(count);
        if (a.similarity.ndim < 0) continue;
        float squares = 0;
        for (int64_t d = 0; d < dim; ++d) squares += units[d] * units[d];
        static_cast<float*>(a.similarity.data)[b * a.similarity.strides[0] + i * a.similarity.strides[1] +
                                               h * a.similarity.strides[2]] =
            squares / static_cast<float>(count * count);
      }
    }
  }
}

inline void rotate(float* row, const float* cosine, const float* sine, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 2) {
    const float even = row[d], odd = row[d + 1];
    row[d] = even * cosine[d] - odd * sine[d];
    row[d + 1] = odd * cosine[d + 1] + even * sine[d + 1];
  }
}

inline float sum_of(const float* row, int64_t dim) {
  Float sums{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) sums += load(row + d);
  float sum = total(sums);
  for (; d < dim; ++d) sum += row[d];
  return sum;
}

/// Of what is left of each element without `mean`.
inline float sum_of_squares(const float* row, int64_t dim, float mean = 0) {
  Float squares{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Float rest = load(row + d) - splat(mean);
    squares += rest * rest;
  }
  float sum = total(squares);
  for (; d < dim; ++d) sum += (row[d] - mean) * (row[d] - mean);
  return sum;
}

/// 1 / RMS of `count` elements.
inline float norm_factor(float squares, int64_t count, float eps) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(count) + eps);
}

/// The same over all heads of a token; 0, unread, where none of them is active.
template <class T>
inline float token_factor(const T* token, int64_t stride, const uint8_t* bits, int64_t first_bit,
                          int64_t heads, int64_t dim, float eps) {
  int64_t active = 0;
  while (active < heads && !bit_at(bits, first_bit + active)) ++active;
  if (active == heads) return 0;
  float squares = 0, row[kRun];
  for (int64_t h = 0; h < heads; ++h) {
    to_floats(token + h * stride, row, dim);
    squares += sum_of_squares(row, dim);
  }
  return norm_factor(squares, heads * dim, eps);
}

/// On x or on the keys of `a`.
template <class T>
inline void norm_rope_tensor(const NormRopeArguments& a, const TensorView& x, const TensorView& weight,
                             const TensorView& cache, int threads) {
  const int64_t batch = x.shape[0], tokens = x.shape[1], heads = x.shape[2], dim = x.shape[3];
  const bool normed = weight.ndim >= 0, across_heads = normed && weight.shape[0] != dim;
  const T* weights = static_cast<const T*>(weight.data);
  float shared[kRun];  // by all heads
  if (normed && !across_heads) to_floats(weights, shared, dim);
#pragma omp parallel for collapse(2) schedule(dynamic, 16) num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      const uint8_t* bits = element_bytes(cache, TensorView{}, b);
      const int64_t position = a.row_offset + t, first_bit = position / a.block_q * heads;
      T* token = static_cast<T*>(x.data) + b * x.strides[0] + t * x.strides[1];
      float row[kRun], own[kRun], factor = 0;
      if (across_heads) factor = token_factor(token, x.strides[2], bits, first_bit, heads, dim, a.eps);
      for (int64_t h = 0; h < heads; ++h) {
        if (!bit_at(bits, first_bit + h)) continue;
        T* head = token + h * x.strides[2];
        to_floats(head, row, dim);
        if (across_heads) {
          to_floats(weights + h * dim, own, dim);
        } else if (normed) {
          factor = norm_factor(sum_of_squares(row, dim), dim, a.eps);
        }
        if (normed) {
          const float* of_head = across_heads ? own : shared;
          for (int64_t d = 0; d < dim; ++d) row[d] *= factor * of_head[d];
        }
        if (a.cos.ndim >= 0) {
          rotate(row, static_cast<const float*>(a.cos.data) + position * a.cos.strides[0],
                 static_cast<const float*>(a.sin.data) + position * a.sin.strides[0], dim);
        }
        from_floats(row, head, dim);
      }
    }
  }
}

template <class T>
inline void norm_rope_as(const NormRopeArguments& a, int threads) {
  norm_rope_tensor<T>(a, a.x, a.weight, a.cache, threads);
  if (a.keys.ndim >= 0) norm_rope_tensor<T>(a, a.keys, a.keys_weight, TensorView{}, threads);
}

/// Calls f with each piece of a row in float32: (first column, columns, values).
template <class T, class F>
inline void in_pieces(const T* row, int64_t width, F&& f) {
  float values[kRun];
  for (int64_t column = 0; column < width; column += kRun) {
    const int64_t count = at_most(kRun, width - column);
    to_floats(row + column, values, count);
    f(column, count, values);
  }
}

template <class T>
inline void ada_layer_norm_row(const T* x, const T* scale, const T* shift, T* out, int64_t width, float eps) {
  const float share = 1.0f / static_cast<float>(width);
  float sum = 0, squares = 0;
  in_pieces(x, width, [&](int64_t, int64_t count, const float* values) { sum += sum_of(values, count); });
  const float mean = sum * share;
  in_pieces(x, width, [&](int64_t, int64_t count, const float* values) {
    squares += sum_of_squares(values, count, mean);
  });
  const float factor = 1.0f / __builtin_sqrtf(squares * share + eps);
  in_pieces(x, width, [&](int64_t column, int64_t count, float* values) {
    float scales[kRun], shifts[kRun];
    to_floats(scale + column, scales, count);
    to_floats(shift + column, shifts, count);
    for (int64_t i = 0; i < count; ++i)
      values[i] = (values[i] - mean) * factor * (1.0f + scales[i]) + shifts[i];
    from_floats(values, out + column, count);
  });
}

template <class T>
inline void ada_layer_norm_as(const AdaLayerNormArguments& a, int threads) {
  const int64_t batch = a.x.shape[0], rows = a.x.shape[1], width = a.x.shape[2];
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      ada_layer_norm_row(static_cast<const T*>(a.x.data) + b * a.x.strides[0] + r * a.x.strides[1],
                         static_cast<const T*>(a.scale.data) + b * a.scale.strides[0],
                         static_cast<const T*>(a.shift.data) + b * a.shift.strides[0],
                         static_cast<T*>(a.out.data) + b * a.out.strides[0] + r * a.out.strides[1], width,
                         a.eps);
    }
  }
}

/// A view's innermost rows, by number: all leading dimensions flattened.
template <class T>
inline T* flat_row(const TensorView& view, int64_t row) {
  int64_t offset = 0;
  for (int dim = view.ndim - 2; dim >= 0; --dim) {
    offset += row % view.shape[dim] * view.strides[dim];
    row /= view.shape[dim];
  }
  return static_cast<T*>(view.data) + offset;
}

/// Calls f(row, column, count) for runs that cover a tensor of `view`'s shape.
template <class F>
inline void for_runs(const TensorView& view, int threads, F&& f) {
  const int64_t width = view.shape[view.ndim - 1];
  int64_t rows = 1;
  for (int dim = 0; dim + 1 < view.ndim; ++dim) rows *= view.shape[dim];
  const int64_t runs = ceil_div(width, kRun);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t run = 0; run < runs; ++run) f(row, run * kRun, at_most(kRun, width - run * kRun));
  }
}

/// Where columns from `column` on of a quantised tensor's row lie; column is a multiple of kScaleColumns.
template <class Value, class Scale>
struct QuantisedRun {
  Value* values;
  Scale* scales;

  QuantisedRun(const TensorView& all_values, const TensorView& all_scales, int64_t row, int64_t column)
      : values(flat_row<Value>(all_values, row) + column),
        scales(flat_row<Scale>(all_scales, row) + column / kScaleColumns) {
    static_assert(kRun % kScaleColumns == 0);
  }
};

inline void dequantise(const QuantisedRun<const E4M3, const float>& from, float* x, int64_t n) {
  for (int64_t first = 0; first < n; first += kScaleColumns) {
    const float scale = from.scales[first / kScaleColumns];
    const int64_t end = at_most(first + kScaleColumns, n);
    for (int64_t j = first; j < end; ++j) x[j] = scale * to_float(from.values[j]);
  }
}

inline void quantise(const float* x, const QuantisedRun<E4M3, float>& to, int64_t n) {
  for (int64_t first = 0; first < n; first += kScaleColumns) {
    const int64_t end = at_most(first + kScaleColumns, n);
    float most = 0;
    for (int64_t j = first; j < end; ++j) most = __builtin_fabsf(x[j]) > most ? __builtin_fabsf(x[j]) : most;
    if (most < 0x1p-100f) most = 0;
    const float inverse = most > 0 ? 448.0f / most : 0.0f;
    to.scales[first / kScaleColumns] = most / 448.0f;
    for (int64_t j = first; j < end; ++j) from_float(x[j] * inverse, to.values[j]);
  }
}

template <class T>
inline void quantize_fp8_as(const QuantizeArguments& a, int threads) {
  for_runs(a.x, threads, [&](int64_t row, int64_t column, int64_t n) {
    float x[kRun];
    to_floats(flat_row<const T>(a.x, row) + column, x, n);
    quantise(x, {a.values, a.scales, row, column}, n);
  });
}

/// read(i, row, column, n, to) gives what is kept of order i, write(i, row, column, n, from) keeps it.
template <class T, class Read, class Write>
inline void take_differences(const TaylorUpdateArguments& a, int threads, Read&& read, Write&& write) {
  const float per_step = 1.0f / a.gap;
  for_runs(a.feature, threads, [&](int64_t row, int64_t column, int64_t n) {
    float now[kRun], old[kRun];
    to_floats(flat_row<const T>(a.feature, row) + column, now, n);
    for (int32_t i = 0; i < a.orders; ++i) {
      const bool more = i < a.valid;  // otherwise what is there is no history
      if (more) read(i, row, column, n, old);
      write(i, row, column, n, now);
      for (int64_t j = 0; j < n; ++j) now[j] = more ? (now[j] - old[j]) * per_step : 0.0f;
    }
    if (a.last.ndim >= 0) from_floats(now, flat_row<T>(a.last, row) + column, n);
  });
}

template <class T>
inline void taylor_update_as(const TaylorUpdateArguments& a, int threads) {
  if (a.scales[0].ndim >= 0) {
    return take_differences<T>(
        a, threads,
        [&](int32_t i, int64_t row, int64_t column, int64_t n, float* to) {
          dequantise({a.derivatives[i], a.scales[i], row, column}, to, n);
        },
        [&](int32_t i, int64_t row, int64_t column, int64_t n, const float* from) {
          quantise(from, {a.derivatives[i], a.scales[i], row, column}, n);
        });
  }
  take_differences<T>(
      a, threads,
      [&](int32_t i, int64_t row, int64_t column, int64_t n, float* to) {
        to_floats(flat_row<const T>(a.derivatives[i], row) + column, to, n);
      },
      [&](int32_t i, int64_t row, int64_t column, int64_t n, const float* from) {
        from_floats(from, flat_row<T>(a.derivatives[i], row) + column, n);
      });
}

/// Whether row `row` of all [B * M] is forecast.
inline bool is_forecast(const TaylorForecastArguments& a, int64_t row) {
  if (a.rows == ForecastRows::kAll) return true;
  const int64_t tokens = a.out.shape[1], position = a.tiles.row_offset + row % tokens;
  const uint8_t* bits = element_bytes(a.tiles.cache, a.tiles.cache_indptr, row / tokens);
  return bit_at(bits, position / a.tiles.block_q) == (a.rows == ForecastRows::kActive);
}

/// read(i, row, column, n, to) gives what is kept of order i.
template <class T, class Read>
inline void add_orders(const TaylorForecastArguments& a, int threads, Read&& read) {
  const float* coefficients = static_cast<const float*>(a.coefficients.data);
  for_runs(a.out, threads, [&](int64_t row, int64_t column, int64_t n) {
    if (!is_forecast(a, row)) return;
    float sum[kRun] = {}, term[kRun];
    for (int32_t i = 0; i < a.orders; ++i) {
      const float c = coefficients[a.coefficients.strides[0] * i];
      if (c == 0.0f) continue;  // an order without history may hold anything
      read(i, row, column, n, term);
      for (int64_t j = 0; j < n; ++j) sum[j] += c * term[j];
    }
    from_floats(sum, flat_row<T>(a.out, row) + column, n);
  });
}

template <class T>
inline void taylor_forecast_as(const TaylorForecastArguments& a, int threads) {
  if (a.scales[0].ndim >= 0) {
    return add_orders<T>(a, threads, [&](int32_t i, int64_t row, int64_t column, int64_t n, float* to) {
      dequantise({a.derivatives[i], a.scales[i], row, column}, to, n);
    });
  }
  add_orders<T>(a, threads, [&](int32_t i, int64_t row, int64_t column, int64_t n, float* to) {
    to_floats(flat_row<const T>(a.derivatives[i], row) + column, to, n);
  });
}

inline void block_mean(const BlockMeanArguments& a, int threads) {
  with_type(a.x.dtype, [&](auto* t) { block_mean_as<std::remove_pointer_t<decltype(t)>>(a, threads); });
}
inline void norm_rope(const NormRopeArguments& a, int threads) {
  with_type(a.x.dtype, [&](auto* t) { norm_rope_as<std::remove_pointer_t<decltype(t)>>(a, threads); });
}
inline void ada_layer_norm(const AdaLayerNormArguments& a, int threads) {
  with_type(a.x.dtype, [&](auto* t) { ada_layer_norm_as<std::remove_pointer_t<decltype(t)>>(a, threads); });
}
inline void taylor_update(const TaylorUpdateArguments& a, int threads) {
  with_type(a.feature.dtype,
            [&](auto* t) { taylor_update_as<std::remove_pointer_t<decltype(t)>>(a, threads); });
}
inline void taylor_forecast(const TaylorForecastArguments& a, int threads) {
  with_type(a.out.dtype,
            [&](auto* t) { taylor_forecast_as<std::remove_pointer_t<decltype(t)>>(a, threads); });
}
inline void quantize_fp8(const QuantizeArguments& a, int threads) {
  with_type(a.x.dtype, [&](auto* t) { quantize_fp8_as<std::remove_pointer_t<decltype(t)>>(a, threads); });
}

}  // namespace
}  // namespace FLASHOMNI_ISA
}  // namespace flashomni::cpu
