// Block-sparse attention. A tile is one active (batch element, head, query block); threads take tiles as they
// come free, and a tile costs what its selected blocks cost.
//
// Within a tile the selected key/value blocks pass one by one: the block is packed, then strips of query rows
// go through scores, online softmax and the product with the values while the strip's scores lie in the first
// cache.
#pragma once

#include <omp.h>

#include <limits>
#include <type_traits>

#include "src/cpu/kernels.h"
#include "src/cpu/panel.h"
#include "src/cpu/workspace.h"

namespace flashomni::cpu {
namespace FLASHOMNI_ISA {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kStripRows = 4 * kMicroRows;
constexpr int64_t kSummaryColumns = 128;  // skipped blocks whose summaries make one tile of columns

/// One thread's buffers. Sizes in elements of each array's type.
struct AttentionScratch {
  Unit *query, *keys, *values, *probabilities, *transpose;
  float *scores, *output, *row_max, *row_sum, *bias, *rows;

  AttentionScratch(Arena& arena, int64_t block_q, int64_t block_kv, int64_t head_dim) {
    const int64_t columns = padded(at_least(block_kv, kSummaryColumns)), dim = padded(head_dim);
    query = arena.take<Unit>(block_q * dim);
    keys = arena.take<Unit>(columns * dim);
    values = arena.take<Unit>(columns * dim);
    probabilities = arena.take<Unit>(kStripRows * columns);
    transpose = arena.take<Unit>(8 * dim);
    scores = arena.take<float>(kStripRows * columns);
    output = arena.take<float>(block_q * dim);
    row_max = arena.take<float>(block_q);
    row_sum = arena.take<float>(block_q);
    bias = arena.take<float>(columns);
    rows = arena.take<float>(2 * dim);
  }
};

/// A strip row's scores become probabilities in place; the row's maximum and sum move on. Returns what the
/// row's output so far has to be multiplied by. Columns from `valid` on get probability 0.
inline float softmax_row(float* row, int64_t valid, int64_t columns, float scale_log2, const float* bias,
                         float& row_max, float& row_sum) {
  for (int64_t c = valid; c < columns; ++c) row[c] = kMinusInfinity;
  const Float scale = splat(scale_log2);
  Float peak = splat(kMinusInfinity);
  for (int64_t c = 0; c < columns; c += kLanes) {
    Float x = load(row + c) * scale;
    if (bias != nullptr) x += load(bias + c);
    if (c + kLanes > valid) {
      // A negative scale would turn the padding into +inf.
      for (int64_t j = at_least(valid - c, 0); j < kLanes; ++j) x[j] = kMinusInfinity;
    }
    store(row + c, x);
    peak = maximum(peak, x);
  }
  const float new_max = row_max > largest(peak) ? row_max : largest(peak);
  if (new_max == kMinusInfinity) {  // nothing seen yet: no shift exists
    std::memset(row, 0, static_cast<size_t>(columns) * sizeof(float));
    return 1.0f;
  }
  const float rescale = row_max == new_max ? 1.0f : exp2_of(splat(row_max - new_max))[0];
  const Float shift = splat(new_max);
  Float sum{};
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Float p = exp2_of(load(row + c) - shift);
    store(row + c, p);
    sum += p;
  }
  row_max = new_max;
  row_sum = row_sum * rescale + total(sum);
  return rescale;
}

inline void scale_row(float* row, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, load(row + i) * splat(factor));
}

/// What is the same for every tile of one call.
template <class T>
struct AttentionCall {
  using Units = typename UnitsOf<T>::type;
  const AttentionArguments& a;
  int64_t heads, group, head_dim, dim;  // dim: head_dim padded to whole panels
  int64_t block_q, block_kv;
  float scale_log2;
  bool ragged;

  explicit AttentionCall(const AttentionArguments& arguments) : a(arguments) {
    ragged = a.q_indptr.ndim >= 0;
    const int axis = ragged ? 1 : 2;
    heads = a.q.shape[axis];
    group = heads / a.k.shape[axis];
    head_dim = a.q.shape[axis + 1];
    dim = padded(head_dim);
    block_q = a.symbols.block_q;
    block_kv = a.symbols.block_kv;
    const float scale = a.scale != 0.0f ? a.scale : 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
    scale_log2 = scale * 1.44269504f;
  }
  int64_t batch() const { return ragged ? a.q_indptr.shape[0] - 1 : a.q.shape[0]; }
};

/// One batch element: where its tokens lie, and its bits.
template <class T>
struct Sequence {
  int64_t index;
  const T *q, *k, *v;
  T* out;
  float* lse;
  int64_t q_tokens, kv_tokens, q_blocks, kv_blocks;
  const uint8_t *cache, *skip;
  int64_t q_row, k_row, v_row, out_row, lse_row;       // strides of a token
  int64_t q_head, k_head, v_head, out_head, lse_head;  // strides of a head
};

template <class T>
inline T* element(const TensorView& view, bool ragged, int64_t batch_index, int64_t first_token) {
  if (view.ndim < 0) return nullptr;
  const int64_t offset = ragged ? first_token * view.strides[0] : batch_index * view.strides[0];
  return static_cast<T*>(view.data) + offset;
}

template <class T>
inline Sequence<T> sequence_of(const AttentionCall<T>& call, int64_t b) {
  const AttentionArguments& a = call.a;
  const bool r = call.ragged;
  const int token = r ? 0 : 1, head = token + 1;
  int64_t q_first = 0, kv_first = 0;
  Sequence<T> s{};
  s.index = b;
  if (r) {
    const int32_t* q_indptr = static_cast<const int32_t*>(a.q_indptr.data);
    const int32_t* kv_indptr = static_cast<const int32_t*>(a.kv_indptr.data);
    q_first = q_indptr[b], kv_first = kv_indptr[b];
    s.q_tokens = q_indptr[b + 1] - q_first, s.kv_tokens = kv_indptr[b + 1] - kv_first;
  } else {
    s.q_tokens = a.q.shape[1], s.kv_tokens = a.k.shape[1];
  }
  s.q = element<const T>(a.q, r, b, q_first), s.k = element<const T>(a.k, r, b, kv_first);
  s.v = element<const T>(a.v, r, b, kv_first), s.out = element<T>(a.out, r, b, q_first);
  s.lse = element<float>(a.lse, r, b, q_first);
  s.q_row = a.q.strides[token], s.k_row = a.k.strides[token], s.v_row = a.v.strides[token];
  s.q_head = a.q.strides[head], s.k_head = a.k.strides[head], s.v_head = a.v.strides[head];
  s.out_row = a.out.strides[token], s.out_head = a.out.strides[head];
  s.lse_row = a.lse.strides[token], s.lse_head = a.lse.strides[head];
  s.q_blocks = ceil_div(s.q_tokens, call.block_q), s.kv_blocks = ceil_div(s.kv_tokens, call.block_kv);
  s.cache = element_bytes(a.symbols.cache, a.symbols.cache_indptr, b);
  s.skip = element_bytes(a.symbols.skip, a.symbols.skip_indptr, b);
  return s;
}

/// One tile on its way: query rows packed, output and softmax state so far.
template <class T>
class Tile {
  using Units = typename UnitsOf<T>::type;

 public:
  Tile(const AttentionCall<T>& call, const Sequence<T>& s, const AttentionScratch& scratch, int64_t head,
       int64_t block)
      : call_(call), s_(s), m_(scratch), head_(head), first_row_(block * call.block_q) {
    rows_ = at_most(call.block_q, s.q_tokens - first_row_);
    q_units_ = units<Units>(call.head_dim);
    for (int64_t r = 0; r < rows_; ++r) {
      Units::make(s.q + (first_row_ + r) * s.q_row + head * s.q_head, call.head_dim, m_.query + r * q_units_);
      m_.row_max[r] = kMinusInfinity;
      m_.row_sum[r] = 0.0f;
    }
  }

  void run(int64_t block) {
    const int64_t first_bit = (block * call_.heads + head_) * s_.kv_blocks;
    for (int64_t j = 0; j < s_.kv_blocks; ++j) {
      if (bit_at(s_.skip, first_bit + j)) visit_block(j);
    }
    if (call_.a.k_mean.ndim >= 0 && s_.skip != nullptr) visit_summaries(first_bit);
    finish();
  }

 private:
  int64_t block_length(int64_t j) const {
    const int64_t length = at_most(call_.block_kv, s_.kv_tokens - j * call_.block_kv);
    if (call_.a.kv_block_len.ndim < 0) return length;
    return at_most(length, static_cast<const int32_t*>(call_.a.kv_block_len.data)[j]);
  }

  void visit_block(int64_t j) {
    const int64_t first = j * call_.block_kv, kv_head = head_ / call_.group;
    int64_t columns = block_length(j), visible = columns;
    if (call_.a.causal) {
      // The last row sees most; a block that even it does not see is none of ours.
      visible = first_row_ + rows_ + s_.kv_tokens - s_.q_tokens - first;
      columns = at_most(columns, visible);
    }
    if (columns <= 0) return;
    const bool diagonal = call_.a.causal && visible - rows_ < columns;
    absorb(s_.k + first * s_.k_row + kv_head * s_.k_head, s_.k_row,
           s_.v + first * s_.v_row + kv_head * s_.v_head, s_.v_row, columns, nullptr,
           diagonal ? visible - rows_ + 1 : columns, diagonal);
  }

  /// Skipped blocks, each stood for by its mean key and value with the weight of its length.
  void visit_summaries(int64_t first_bit) {
    const TensorView &k = call_.a.k_mean, &v = call_.a.v_mean;
    const int64_t kv_head = head_ / call_.group, b = s_.index;
    const float* keys = static_cast<const float*>(k.data) + b * k.strides[0] + kv_head * k.strides[2];
    const float* values = static_cast<const float*>(v.data) + b * v.strides[0] + kv_head * v.strides[2];
    for (int64_t j = 0; j < s_.kv_blocks; j += kSummaryColumns) {
      const int64_t columns = at_most(kSummaryColumns, s_.kv_blocks - j);
      bool any = false;
      for (int64_t c = 0; c < padded(columns); ++c) {
        const bool skipped = c < columns && !bit_at(s_.skip, first_bit + j + c) && block_length(j + c) > 0;
        m_.bias[c] = skipped ? __builtin_log2f(static_cast<float>(block_length(j + c))) : kMinusInfinity;
        any |= skipped;
      }
      if (any) {
        absorb(keys + j * k.strides[1], k.strides[1], values + j * v.strides[1], v.strides[1], columns,
               m_.bias, columns, false);
      }
    }
  }

  /// Row r of the tile sees `first_valid` + r columns where `diagonal`, `columns` otherwise.
  template <class S>
  void absorb(const S* keys, int64_t key_row, const S* values, int64_t value_row, int64_t columns,
              const float* bias, int64_t first_valid, bool diagonal) {
    const int64_t wide = padded(columns), dim = call_.dim, k_units = units<Units>(columns);
    const int64_t value_panel = k_units * kPanel;
    pack_transposed<Units>(keys, key_row, columns, call_.head_dim, m_.keys, q_units_ * kPanel, m_.transpose);
    pack_rows(Units{}, values, value_row, call_.head_dim, columns, m_.values, value_panel, m_.rows);
    for (int64_t r = 0; r < rows_; r += kStripRows) {
      const int64_t strip = at_most(kStripRows, rows_ - r);
      multiply<Units>(m_.query + r * q_units_, q_units_, strip, m_.keys, q_units_ * kPanel, wide / kPanel,
                      q_units_, m_.scores, wide, false);
      for (int64_t i = 0; i < strip; ++i) {
        const int64_t seen = diagonal ? at_least(0, at_most(columns, first_valid + r + i)) : columns;
        const float rescale = softmax_row(m_.scores + i * wide, seen, wide, call_.scale_log2, bias,
                                          m_.row_max[r + i], m_.row_sum[r + i]);
        if (begun_ && rescale != 1.0f) scale_row(m_.output + (r + i) * dim, dim, rescale);
      }
      const Unit* p = reinterpret_cast<const Unit*>(m_.scores);
      int64_t p_stride = wide;
      if constexpr (Units::kElements > 1) {
        p = m_.probabilities;
        p_stride = units<Units>(wide);
        for (int64_t i = 0; i < strip; ++i) {
          Units::make(m_.scores + i * wide, wide, m_.probabilities + i * p_stride);
        }
      }
      multiply<Units>(p, p_stride, strip, m_.values, value_panel, dim / kPanel, k_units, m_.output + r * dim,
                      dim, begun_);
    }
    begun_ = true;
  }

  void finish() {
    for (int64_t r = 0; r < rows_; ++r) {
      T* out = s_.out + (first_row_ + r) * s_.out_row + head_ * s_.out_head;
      float* row = m_.output + r * call_.dim;
      const bool empty = !begun_ || m_.row_max[r] == kMinusInfinity;
      if (empty) {
        std::memset(row, 0, static_cast<size_t>(call_.dim) * sizeof(float));
      } else {
        scale_row(row, call_.dim, 1.0f / m_.row_sum[r]);
      }
      from_floats(row, out, call_.head_dim);
      if (s_.lse != nullptr) {
        s_.lse[(first_row_ + r) * s_.lse_row + head_ * s_.lse_head] =
            empty ? kMinusInfinity : m_.row_max[r] + __builtin_log2f(m_.row_sum[r]);
      }
    }
  }

  const AttentionCall<T>& call_;
  const Sequence<T>& s_;
  const AttentionScratch& m_;
  int64_t head_, first_row_, rows_, q_units_;
  bool begun_ = false;
};

template <class T>
inline void attention_as(const AttentionArguments& arguments, void* workspace, int threads) {
  const AttentionCall<T> call(arguments);
  Arena measure(nullptr);
  AttentionScratch(measure, call.block_q, call.block_kv, call.head_dim);
  const size_t per_thread = measure.used();
  // Ragged elements differ in their number of blocks; empty tiles past an element's end cost a comparison.
  int64_t most_blocks = 0;
  for (int64_t b = 0; b < call.batch(); ++b)
    most_blocks = at_least(most_blocks, sequence_of(call, b).q_blocks);
  const int64_t tiles = call.batch() * call.heads * most_blocks;
#pragma omp parallel num_threads(threads)
  {
    Arena arena(static_cast<char*>(workspace) + per_thread * static_cast<size_t>(omp_get_thread_num()));
    const AttentionScratch scratch(arena, call.block_q, call.block_kv, call.head_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t block = t % most_blocks, head = t / most_blocks % call.heads,
                    b = t / most_blocks / call.heads;
      const Sequence<T> s = sequence_of(call, b);
      if (block >= s.q_blocks || !bit_at(s.cache, block * call.heads + head)) continue;
      Tile<T>(call, s, scratch, head, block).run(block);
    }
  }
}

inline size_t attention_workspace(const AttentionArguments& a, int threads) {
  Arena arena(nullptr);
  AttentionScratch(arena, a.symbols.block_q, a.symbols.block_kv, a.q.shape[a.q.ndim - 1]);
  return arena.used() * static_cast<size_t>(threads);
}

inline void attention(const AttentionArguments& arguments, void* workspace, int threads) {
  with_type(arguments.q.dtype, [&](auto* type) {
    attention_as<std::remove_pointer_t<decltype(type)>>(arguments, workspace, threads);
  });
}

}  // namespace
}  // namespace FLASHOMNI_ISA
}  // namespace flashomni::cpu
