// Threads take (batch element, head) pairs and write one byte a decision; then the bytes are packed into
// bits, whose bytes several heads share.
#include "src/cpu/select.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace flashomni::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Shape {
  int64_t batch, q_blocks, kv_blocks, heads, group, dim;
  int64_t text_q_begin, text_q_end, text_kv_begin, text_kv_end;  // blocks that hold text
  explicit Shape(const SelectArguments& a) {
    batch = a.q_mean.shape[0], q_blocks = a.q_mean.shape[1], heads = a.q_mean.shape[2],
    dim = a.q_mean.shape[3];
    kv_blocks = a.k_mean.shape[1], group = heads / a.k_mean.shape[2];
    const int64_t end = a.text_start + a.text_length;
    const bool text = a.text_length > 0;
    text_q_begin = text ? a.text_start / a.symbols.block_q : 0;
    text_q_end = text ? ceil_div(end, a.symbols.block_q) : 0;
    text_kv_begin = text ? a.text_start / a.symbols.block_kv : 0;
    text_kv_end = text ? ceil_div(end, a.symbols.block_kv) : 0;
  }
  bool text_q(int64_t i) const { return i >= text_q_begin && i < text_q_end; }
  bool text_kv(int64_t j) const { return j >= text_kv_begin && j < text_kv_end; }
};

/// One thread's buffers, and the decisions that all threads share.
struct Buffers {
  uint8_t *active, *kept;  // [batch][q_blocks][heads], [batch][q_blocks][heads][kv_blocks]
  float *scores, *given, *taken, *share, *column;
  int32_t* order;

  static size_t shared_bytes(const Shape& s) {
    const int64_t tiles = s.batch * s.q_blocks * s.heads;
    return static_cast<size_t>(tiles + tiles * s.kv_blocks + 63) / 64 * 64;
  }
  static size_t thread_bytes(const Shape& s) {
    const int64_t blocks = std::max(s.q_blocks, s.kv_blocks);
    return static_cast<size_t>((s.q_blocks * s.kv_blocks + 5 * blocks) * 4 + 63) / 64 * 64;
  }
  Buffers(const Shape& s, void* workspace, int thread) {
    const int64_t tiles = s.batch * s.q_blocks * s.heads, blocks = std::max(s.q_blocks, s.kv_blocks);
    active = static_cast<uint8_t*>(workspace);
    kept = active + tiles;
    char* own =
        static_cast<char*>(workspace) + shared_bytes(s) + thread_bytes(s) * static_cast<size_t>(thread);
    scores = reinterpret_cast<float*>(own);
    given = scores + s.q_blocks * s.kv_blocks;
    taken = given + blocks;
    share = taken + blocks;
    column = share + blocks;
    order = reinterpret_cast<int32_t*>(column + blocks);
  }
};

/// In place; entries that are not finite count as the lowest. Returns false (all zero) if none is finite.
bool softmax(float* x, int64_t n) {
  float peak = kLowest;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) x[i] = kLowest;
    peak = std::max(peak, x[i]);
  }
  if (peak == kLowest) {
    std::fill(x, x + n, 0.0f);
    return false;
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - peak);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(x[i] / sum);
  return true;
}

/// The first `n` of `order`, by ascending weight, ties by index.
void sort_by(const float* weight, int32_t* order, int64_t n) {
  std::sort(order, order + n, [weight](int32_t a, int32_t b) {
    return weight[a] != weight[b] ? weight[a] < weight[b] : a < b;
  });
}

int64_t last_heaviest(const float* weight, int64_t n) {
  int64_t at = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (weight[i] >= weight[at]) at = i;
  }
  return at;
}

void score(const SelectArguments& a, const Shape& s, int64_t b, int64_t h, float* scores) {
  const float scale = a.scale != 0.0f ? a.scale : 1.0f / std::sqrt(static_cast<float>(s.dim));
  const float* q = a.q_mean.as<const float>() + b * a.q_mean.strides[0] + h * a.q_mean.strides[2];
  const float* k = a.k_mean.as<const float>() + b * a.k_mean.strides[0] + h / s.group * a.k_mean.strides[2];
  for (int64_t i = 0; i < s.q_blocks; ++i) {
    for (int64_t j = 0; j < s.kv_blocks; ++j) {
      const float *x = q + i * a.q_mean.strides[1], *y = k + j * a.k_mean.strides[1];
      float sum[8] = {};
      for (int64_t d = 0; d < s.dim; d += 8) {  // every head_dim is a multiple of 8
        for (int e = 0; e < 8; ++e) sum[e] += x[d + e] * y[d + e];
      }
      scores[i * s.kv_blocks + j] =
          scale * (((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
    }
  }
}

/// share[i] = mean of C_i and G_i over their sums, for the vision query blocks. `scores` are raw.
void text_shares(const SelectArguments& a, const Shape& s, const Buffers& m) {
  const int64_t ratio = a.symbols.block_q / a.symbols.block_kv;
  std::fill(m.given, m.given + s.q_blocks, 0.0f);
  std::fill(m.taken, m.taken + s.q_blocks, 0.0f);
  for (int64_t j = s.text_q_begin; j < s.text_q_end; ++j) {
    std::copy_n(m.scores + j * s.kv_blocks, s.kv_blocks, m.column);
    softmax(m.column, s.kv_blocks);
    for (int64_t c = 0; c < s.kv_blocks; ++c) {
      if (!s.text_q(c / ratio)) m.given[c / ratio] += m.column[c];
    }
  }
  for (int64_t j = s.text_kv_begin; j < s.text_kv_end; ++j) {
    for (int64_t i = 0; i < s.q_blocks; ++i) {
      m.column[i] = s.text_q(i) ? kLowest : m.scores[i * s.kv_blocks + j];
    }
    softmax(m.column, s.q_blocks);
    for (int64_t i = 0; i < s.q_blocks; ++i) m.taken[i] += m.column[i];
  }
  const double given = std::accumulate(m.given, m.given + s.q_blocks, 0.0);
  const double taken = std::accumulate(m.taken, m.taken + s.q_blocks, 0.0);
  for (int64_t i = 0; i < s.q_blocks; ++i) {
    m.share[i] = static_cast<float>(
        0.5 * ((given > 0 ? m.given[i] / given : 0) + (taken > 0 ? m.taken[i] / taken : 0)));
  }
}

/// What a cumulative share may reach. At 1 it is all of it, though rounded shares may add up to a little
/// more.
double limit_of(float tau) {
  return tau >= 1 ? std::numeric_limits<double>::infinity() : static_cast<double>(tau);
}

void choose_cached(const SelectArguments& a, const Shape& s, const Buffers& m, int64_t b, int64_t h) {
  uint8_t* active = m.active + b * s.q_blocks * s.heads + h;
  for (int64_t i = 0; i < s.q_blocks; ++i) active[i * s.heads] = 1;
  if (a.text_length == 0 || a.tau_q <= 0) return;
  text_shares(a, s, m);
  int64_t n = 0;
  for (int64_t i = 0; i < s.q_blocks; ++i) {
    if (!s.text_q(i)) m.order[n++] = static_cast<int32_t>(i);
  }
  sort_by(m.share, m.order, n);
  double mass = 0;
  for (int64_t i = 0; i < n; ++i) {
    mass += m.share[m.order[i]];
    if (mass > limit_of(a.tau_q)) break;
    active[m.order[i] * s.heads] = 0;
  }
}

/// Whether KV block j's mean does not stand for its tokens. What is no number is not above the threshold.
bool is_guarded(const SelectArguments& a, const Shape& s, int64_t b, int64_t h, int64_t j) {
  if (!a.k_similarity.present()) return false;
  const auto& strides = a.k_similarity.strides;
  const float* x = a.k_similarity.as<const float>();
  return !(x[b * strides[0] + j * strides[1] + h / s.group * strides[2]] > a.self_similarity);
}

void choose_skipped(const SelectArguments& a, const Shape& s, const Buffers& m, int64_t b, int64_t h) {
  for (int64_t i = 0; i < s.q_blocks; ++i) {
    const int64_t tile = (b * s.q_blocks + i) * s.heads + h;
    uint8_t* kept = m.kept + tile * s.kv_blocks;
    std::fill(kept, kept + s.kv_blocks, m.active[tile]);
    if (!m.active[tile] || s.text_q(i) || a.tau_kv <= 0) continue;
    float* row = m.scores + i * s.kv_blocks;
    if (!softmax(row, s.kv_blocks)) continue;  // nothing finite to go by: keep the row
    // Without text columns the heaviest block stays whatever tau_kv says.
    const bool text = s.text_kv_end > s.text_kv_begin;
    const int64_t heaviest = text ? -1 : last_heaviest(row, s.kv_blocks);
    int64_t n = 0;
    for (int64_t j = 0; j < s.kv_blocks; ++j) {
      if (!s.text_kv(j) && j != heaviest && !is_guarded(a, s, b, h, j))
        m.order[n++] = static_cast<int32_t>(j);
    }
    sort_by(row, m.order, n);
    double mass = 0;
    for (int64_t j = 0; j < n; ++j) {
      mass += row[m.order[j]];
      if (mass > limit_of(a.tau_kv)) break;
      kept[m.order[j]] = 0;
    }
  }
}

/// The ramp's value applied to both thresholds; whatever it holds, they stay in [0, 1].
SelectArguments with_ramp(SelectArguments a) {
  if (!a.ramp.present()) return a;
  const float ramp = *a.ramp.as<const float>();
  for (float* tau : {&a.tau_q, &a.tau_kv}) *tau = std::fmin(std::fmax(*tau * ramp, 0.0f), 1.0f);
  return a;
}

/// S_q: a batch element with too few active tiles computes none.
void switch_layer(const SelectArguments& a, const Shape& s, const Buffers& m, int64_t b) {
  const int64_t tiles = s.q_blocks * s.heads;
  uint8_t* active = m.active + b * tiles;
  const int64_t count = std::accumulate(active, active + tiles, int64_t{0});
  if (a.s_q <= 0 || static_cast<double>(count) > static_cast<double>(a.s_q) * static_cast<double>(tiles))
    return;
  std::fill(active, active + tiles, uint8_t{0});
  std::fill_n(m.kept + b * tiles * s.kv_blocks, tiles * s.kv_blocks, uint8_t{0});
}

}  // namespace

size_t select_workspace(const SelectArguments& arguments, int threads) {
  const Shape shape(arguments);
  return Buffers::shared_bytes(shape) + Buffers::thread_bytes(shape) * static_cast<size_t>(threads);
}

void select(const SelectArguments& arguments, void* workspace, int threads) {
  const SelectArguments a = with_ramp(arguments);
  const Shape s(a);
#pragma omp parallel num_threads(threads)
  {
    const Buffers m(s, workspace, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < s.batch * s.heads; ++pair) {
      const int64_t b = pair / s.heads, h = pair % s.heads;
      score(a, s, b, h, m.scores);
      choose_cached(a, s, m, b, h);
      choose_skipped(a, s, m, b, h);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t tiles = s.q_blocks * s.heads;
      switch_layer(a, s, m, b);
      pack_bits(m.active + b * tiles, tiles, BitOrder::kLittle,
                a.symbols.cache.as<uint8_t>() + b * a.symbols.cache.strides[0]);
      pack_bits(m.kept + b * tiles * s.kv_blocks, tiles * s.kv_blocks, BitOrder::kLittle,
                a.symbols.skip.as<uint8_t>() + b * a.symbols.skip.strides[0]);
    }
  }
}

}  // namespace flashomni::cpu
