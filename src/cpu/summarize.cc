// Threads take heads for the shares; rows and whole elements are few and one thread's.
#include "src/cpu/summarize.h"

namespace flashomni::cpu {
namespace {

struct Problem {
  const Symbols& symbols;
  SymbolGeometry geometry;
  int64_t batch;
  explicit Problem(const SummarizeArguments& a)
      : symbols(a.symbols),
        geometry{a.q_tokens, a.kv_tokens, a.heads, a.symbols.block_q, a.symbols.block_kv},
        batch(a.symbols.cache.size(0)) {}

  BitRow cache(int64_t b, int64_t first, int64_t length) const {
    return {symbols.cache.as<const uint8_t>() + b * symbols.cache.strides[0], first, length};
  }
  BitRow skip_row(int64_t b, int64_t tile) const {
    const int64_t kv_blocks = geometry.kv_blocks();
    return {symbols.skip.as<const uint8_t>() + b * symbols.skip.strides[0], tile * kv_blocks, kv_blocks};
  }
};

void write_shares(const SummarizeArguments& a, const Problem& p, int64_t head) {
  const int64_t q_blocks = p.geometry.q_blocks(), rows = p.batch * q_blocks;
  int64_t active = 0, selected = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / q_blocks, tile = row % q_blocks * a.heads + head;
    if (!p.cache(b, tile, 1)[0]) continue;
    ++active;
    selected += p.skip_row(b, tile).count();
  }
  const auto share = [](int64_t count, int64_t of) {
    return static_cast<float>(static_cast<double>(count) / static_cast<double>(of));
  };
  float* shares = a.shares.as<float>() + head;
  shares[0] = share(selected, rows * p.geometry.kv_blocks());
  shares[a.shares.strides[0]] = share(active, rows);
}

void write_rows(const SummarizeArguments& a, const Problem& p, int64_t b) {
  uint8_t* rows = a.rows.as<uint8_t>() + b * a.rows.strides[0];
  bool awake = false;
  for (int64_t i = 0; i < a.rows.size(1) * 8; ++i) {
    const bool active = i < p.geometry.q_blocks() && p.cache(b, i * a.heads, a.heads).next(0) < a.heads;
    write_bit(rows, i, active);
    awake |= active;
  }
  a.awake.as<uint8_t>()[b] = awake;
}

}  // namespace

void summarize(const SummarizeArguments& a, int threads) {
  const Problem p(a);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < a.heads; ++head) write_shares(a, p, head);
  for (int64_t b = 0; b < p.batch; ++b) write_rows(a, p, b);
}

}  // namespace flashomni::cpu
