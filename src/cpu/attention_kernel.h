// Block-sparse attention. A tile is one active (batch element, head, query block); a thread takes a run of
// tiles of one head, and a tile costs what its selected blocks cost.
//
// Key/value blocks pass one by one: a block that a tile of the run selects is packed, as float32 or pairs,
// and serves all that select it. In each of those, strips of query rows go through scores, online softmax and
// the product with the values while the strip's scores lie in the first cache.
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

constexpr int64_t kMostTiles = 8;          // of a run
constexpr int64_t kRunBytes = 512 * 1024;  // a run's queries and outputs: about a second cache

inline int64_t tiles_of_run(int64_t block_q, int64_t dim) {
  return at_least(1, at_most(kMostTiles, kRunBytes / (block_q * dim * 8)));
}

/// What one tile of a run keeps.
struct TileScratch {
  Unit* query;
  float *output, *row_max, *row_sum;
};

/// One thread's buffers. Sizes in elements of each array's type.
struct AttentionScratch {
  Unit *keys, *values, *probabilities, *transpose;
  float *scores, *bias, *rows;
  TileScratch tiles[kMostTiles];

  AttentionScratch(Arena& arena, int64_t block_q, int64_t block_kv, int64_t head_dim) {
    const int64_t columns = padded(at_least(block_kv, kSummaryColumns)), dim = padded(head_dim);
    keys = arena.take<Unit>(columns * dim);
    values = arena.take<Unit>(columns * dim);
    probabilities = arena.take<Unit>(kStripRows * columns);
    transpose = arena.take<Unit>(8 * dim);
    scores = arena.take<float>(kStripRows * columns);
    bias = arena.take<float>(columns);
    rows = arena.take<float>(2 * dim);
    for (int64_t i = 0; i < tiles_of_run(block_q, dim); ++i) {
      tiles[i].query = arena.take<Unit>(block_q * dim);
      tiles[i].output = arena.take<float>(block_q * dim);
      tiles[i].row_max = arena.take<float>(block_q);
      tiles[i].row_sum = arena.take<float>(block_q * kLanes);  // by lanes: added up at the end
    }
  }
};

/// How a row of products becomes scores in base 2: x * scale + bias.
struct Scores {
  const float* row;
  Float scale;
  const float* bias;  // may be null

  Float operator()(int64_t c) const {
    const Float x = load(row + c) * scale;
    return bias == nullptr ? x : x + load(bias + c);
  }
  /// The last vector, of which only `valid` lanes are columns.
  Float last(int64_t c, int64_t valid) const {
    Float x = (*this)(c);
    for (int64_t j = valid; j < kLanes; ++j) x[j] = kMinusInfinity;
    return x;
  }
};

inline float peak_of(const Scores& scores, int64_t valid) {
  Float peak = splat(kMinusInfinity);
  int64_t c = 0;
  for (; c + kLanes <= valid; c += kLanes) peak = maximum(peak, scores(c));
  if (c < valid) peak = maximum(peak, scores.last(c, valid - c));
  return largest(peak);
}

/// Writes the row's probabilities 2^(score - shift), 0 from column `valid` on; returns their sum by lanes.
inline Float exponentials(const Scores& scores, int64_t valid, int64_t columns, float shift, float* out) {
  Float sum{};
  int64_t c = 0;
  for (; c + kLanes <= valid; c += kLanes) {
    const Float p = exp2_of(scores(c) - splat(shift));
    store(out + c, p);
    sum += p;
  }
  if (c < valid) {
    const Float p = exp2_of(scores.last(c, valid - c) - splat(shift));
    store(out + c, p);
    sum += p;
    c += kLanes;
  }
  for (; c < columns; c += kLanes) store(out + c, Float{});
  return sum;
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

/// A run of one head's tiles on their way: query rows packed, outputs and softmax states so far.
template <class T>
class Run {
  using Units = typename UnitsOf<T>::type;

 public:
  Run(const AttentionCall<T>& call, const Sequence<T>& s, const AttentionScratch& scratch, int64_t head)
      : call_(call), s_(s), m_(scratch), head_(head), q_units_(units<Units>(call.head_dim)) {}

  void add(int64_t block) {
    Tile& tile = tiles_[count_];
    tile = {m_.tiles[count_], block * call_.block_q, 0, (block * call_.heads + head_) * s_.kv_blocks, false};
    tile.rows = at_most(call_.block_q, s_.q_tokens - tile.first_row);
    for (int64_t r = 0; r < tile.rows; ++r) {
      Units::make(s_.q + (tile.first_row + r) * s_.q_row + head_ * s_.q_head, call_.head_dim,
                  tile.query + r * q_units_);
      tile.row_max[r] = kMinusInfinity;
      store(tile.row_sum + r * kLanes, Float{});
    }
    ++count_;
  }

  void finish() {
    for (int64_t j = 0; j < s_.kv_blocks; ++j) visit_block(j);
    if (call_.a.k_mean.ndim >= 0 && s_.skip != nullptr) visit_summaries();
    for (int64_t i = 0; i < count_; ++i) write(tiles_[i]);
  }

 private:
  struct Tile : TileScratch {
    int64_t first_row, rows, first_bit;
    bool begun;
  };

  int64_t block_length(int64_t j) const {
    const int64_t length = at_most(call_.block_kv, s_.kv_tokens - j * call_.block_kv);
    if (call_.a.kv_block_len.ndim < 0) return length;
    return at_most(length, static_cast<const int32_t*>(call_.a.kv_block_len.data)[j]);
  }

  void visit_block(int64_t j) {
    const int64_t first = j * call_.block_kv, kv_head = head_ / call_.group, length = block_length(j);
    bool packed = false;
    for (int64_t i = 0; i < count_; ++i) {
      Tile& tile = tiles_[i];
      if (!bit_at(s_.skip, tile.first_bit + j)) continue;
      int64_t columns = length, visible = length;
      if (call_.a.causal) {
        // The last row sees most; a block that even it does not see is none of ours.
        visible = tile.first_row + tile.rows + s_.kv_tokens - s_.q_tokens - first;
        columns = at_most(length, visible);
      }
      if (columns <= 0) continue;
      if (!packed) {
        pack(s_.k + first * s_.k_row + kv_head * s_.k_head, s_.k_row,
             s_.v + first * s_.v_row + kv_head * s_.v_head, s_.v_row, length);
        packed = true;
      }
      const bool diagonal = call_.a.causal && visible - tile.rows < columns;
      absorb(tile, columns, nullptr, diagonal ? visible - tile.rows + 1 : columns, diagonal);
    }
  }

  /// Skipped blocks, each stood for by its mean key and value with the weight of its length.
  void visit_summaries() {
    const TensorView &k = call_.a.k_mean, &v = call_.a.v_mean;
    const int64_t kv_head = head_ / call_.group, b = s_.index;
    const float* keys = static_cast<const float*>(k.data) + b * k.strides[0] + kv_head * k.strides[2];
    const float* values = static_cast<const float*>(v.data) + b * v.strides[0] + kv_head * v.strides[2];
    for (int64_t j = 0; j < s_.kv_blocks; j += kSummaryColumns) {
      const int64_t columns = at_most(kSummaryColumns, s_.kv_blocks - j);
      bool packed = false;
      for (int64_t i = 0; i < count_; ++i) {
        if (!weigh_summaries(tiles_[i], j, columns)) continue;
        if (!packed) {
          pack(keys + j * k.strides[1], k.strides[1], values + j * v.strides[1], v.strides[1], columns);
          packed = true;
        }
        absorb(tiles_[i], columns, m_.bias, columns, false);
      }
    }
  }

  /// Sets the bias of the summaries from block `first` on; false if the tile skips none of those blocks.
  bool weigh_summaries(const Tile& tile, int64_t first, int64_t columns) {
    bool any = false;
    for (int64_t c = 0; c < padded(columns); ++c) {
      const int64_t j = first + c;
      const bool skipped = c < columns && !bit_at(s_.skip, tile.first_bit + j) && block_length(j) > 0;
      m_.bias[c] = skipped ? __builtin_log2f(static_cast<float>(block_length(j))) : kMinusInfinity;
      any |= skipped;
    }
    return any;
  }

  template <class S>
  void pack(const S* keys, int64_t key_row, const S* values, int64_t value_row, int64_t columns) {
    value_panel_ = units<Units>(columns) * kPanel;
    pack_transposed<Units>(keys, key_row, columns, call_.head_dim, m_.keys, q_units_ * kPanel, m_.transpose);
    pack_rows(Units{}, values, value_row, call_.head_dim, columns, m_.values, value_panel_, m_.rows);
  }

  /// The tile takes the first `columns` of the packed keys and values in. Its row r sees `first_valid` + r of
  /// them where `diagonal`, all otherwise.
  void absorb(Tile& tile, int64_t columns, const float* bias, int64_t first_valid, bool diagonal) {
    const int64_t wide = padded(columns), dim = call_.dim;
    for (int64_t r = 0; r < tile.rows; r += kStripRows) {
      const int64_t strip = at_most(kStripRows, tile.rows - r);
      multiply<Units>(tile.query + r * q_units_, q_units_, strip, m_.keys, q_units_ * kPanel, wide / kPanel,
                      q_units_, m_.scores, wide, false);
      softmax(tile, r, strip, wide, bias, [&](int64_t row) {
        return diagonal ? at_least(0, at_most(columns, first_valid + row)) : columns;
      });
      const Unit* p = reinterpret_cast<const Unit*>(m_.scores);
      int64_t p_stride = wide;
      if constexpr (Units::kElements > 1) {
        p = m_.probabilities;
        p_stride = units<Units>(wide);
        for (int64_t i = 0; i < strip; ++i) {
          Units::make(m_.scores + i * wide, wide, m_.probabilities + i * p_stride);
        }
      }
      multiply<Units>(p, p_stride, strip, m_.values, value_panel_, dim / kPanel, units<Units>(columns),
                      tile.output + r * dim, dim, tile.begun);
    }
    tile.begun = true;
  }

  /// Products of the tile's rows r, r + 1.. become probabilities in place; the rows' maxima, sums and outputs
  /// so far move on. `seen(row)`: how many columns a row sees.
  template <class Seen>
  void softmax(Tile& tile, int64_t r, int64_t rows, int64_t wide, const float* bias, Seen&& seen) {
    float peaks[kStripRows];  // all before the first exponential: rows do not wait for each other then
    const auto scores_of = [&](int64_t i) {
      return Scores{m_.scores + i * wide, splat(call_.scale_log2), bias};
    };
    for (int64_t i = 0; i < rows; ++i) peaks[i] = peak_of(scores_of(i), seen(r + i));
    for (int64_t i = 0; i < rows; ++i) {
      float &row_max = tile.row_max[r + i], *row_sum = tile.row_sum + (r + i) * kLanes;
      const float new_max = row_max > peaks[i] ? row_max : peaks[i];
      if (new_max == kMinusInfinity) {  // nothing seen yet: no shift exists
        std::memset(m_.scores + i * wide, 0, static_cast<size_t>(wide) * sizeof(float));
        continue;
      }
      const Float sum = exponentials(scores_of(i), seen(r + i), wide, new_max, m_.scores + i * wide);
      if (row_max != new_max) {
        const float rescale = exp2_of(splat(row_max - new_max))[0];
        scale_row(row_sum, kLanes, rescale);
        if (tile.begun) scale_row(tile.output + (r + i) * call_.dim, call_.dim, rescale);
        row_max = new_max;
      }
      store(row_sum, load(row_sum) + sum);
    }
  }

  void write(const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* out = s_.out + (tile.first_row + r) * s_.out_row + head_ * s_.out_head;
      float* row = tile.output + r * call_.dim;
      const float sum = total(load(tile.row_sum + r * kLanes));
      const bool empty = tile.row_max[r] == kMinusInfinity;
      if (empty) {
        std::memset(row, 0, static_cast<size_t>(call_.dim) * sizeof(float));
      } else {
        scale_row(row, call_.dim, 1.0f / sum);
      }
      from_floats(row, out, call_.head_dim);
      if (s_.lse != nullptr) {
        s_.lse[(tile.first_row + r) * s_.lse_row + head_ * s_.lse_head] =
            empty ? kMinusInfinity : tile.row_max[r] + __builtin_log2f(sum);
      }
    }
  }

  const AttentionCall<T>& call_;
  const Sequence<T>& s_;
  const AttentionScratch& m_;
  int64_t head_, q_units_, value_panel_ = 0, count_ = 0;
  Tile tiles_[kMostTiles];
};

template <class T>
inline void attention_as(const AttentionArguments& arguments, void* workspace, int threads) {
  const AttentionCall<T> call(arguments);
  Arena measure(nullptr);
  AttentionScratch(measure, call.block_q, call.block_kv, call.head_dim);
  const size_t per_thread = measure.used();
  // Ragged elements differ in their number of blocks; tiles past an element's end cost a comparison.
  int64_t most_blocks = 0;
  for (int64_t b = 0; b < call.batch(); ++b)
    most_blocks = at_least(most_blocks, sequence_of(call, b).q_blocks);
  const int64_t tiles = call.batch() * call.heads * most_blocks;
  const int64_t longest = tiles_of_run(call.block_q, call.dim);
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    Arena arena(static_cast<char*>(workspace) + per_thread * static_cast<size_t>(omp_get_thread_num()));
    const AttentionScratch scratch(arena, call.block_q, call.block_kv, call.head_dim);
    const auto upcoming = [&next] { return __atomic_load_n(&next, __ATOMIC_RELAXED); };
    for (int64_t t = upcoming(); t < tiles; t = upcoming()) {
      // Shorter runs towards the end, so that the threads end together.
      const int64_t length = at_least(1, at_most(longest, (tiles - t) / (4 * threads)));
      const int64_t head = t / most_blocks % call.heads, first = t % most_blocks;
      const Sequence<T> s = sequence_of(call, t / most_blocks / call.heads);
      int64_t blocks[kMostTiles], found = 0, block = first;
      for (; block < s.q_blocks && found < length; ++block) {
        if (bit_at(s.cache, block * call.heads + head)) blocks[found++] = block;
      }
      const int64_t end = found < length ? most_blocks : block;  // no more of this head
      if (!__atomic_compare_exchange_n(&next, &t, t - first + end, false, __ATOMIC_RELAXED,
                                       __ATOMIC_RELAXED)) {
        continue;  // another thread took them
      }
      if (found == 0) continue;
      Run<T> run(call, s, scratch, head);
      for (int64_t i = 0; i < found; ++i) run.add(blocks[i]);
      run.finish();
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
