// Selection, block means and what symbols come to, against references.
#include "flashomni/select.h"

#include <numeric>

#include "tests/cpp/reference.h"
#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::Array;
using testing::Masks;
using testing::Random;
using testing::run_operator;
using testing::uniform;

class SelectTest : public ::testing::TestWithParam<std::string> {
 protected:
  testing::ScopedVariable force_{"FLASHOMNI_CPU_ISA", GetParam()};
};

TEST_P(SelectTest, BlockMean) {
  Random random(91);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t dim : {64, 72, 256}) {
      for (const int32_t block : {64, 128}) {
        const int64_t tokens = uniform(random, 1, 300);
        const Array x = Array::random(dtype, {2, tokens, 3, dim}, random, 1, 8);
        Array out(DType::kFloat32, {2, ceil_div(tokens, block), 3, dim});
        out.poison();
        BlockMeanArguments a;
        a.x = x, a.out = out, a.block = block;
        block_mean(a, Context{});
        for (int64_t b = 0; b < 2; ++b) {
          for (int64_t i = 0; i < out.size(1); ++i) {
            for (int64_t h = 0; h < 3; ++h) {
              for (int64_t d = 0; d < dim; ++d) {
                double sum = 0, magnitude = 0;
                const int64_t end = std::min<int64_t>(tokens, (i + 1) * block);
                for (int64_t t = i * block; t < end; ++t)
                  sum += x(b, t, h, d), magnitude += std::fabs(x(b, t, h, d));
                const double n = static_cast<double>(end - i * block);
                ASSERT_NEAR(out(b, i, h, d), sum / n,
                            magnitude / n * block * testing::rounding(DType::kFloat32));
              }
            }
          }
        }
      }
    }
  }
}

using Matrix = std::vector<std::vector<double>>;

std::vector<double> softmax(std::vector<double> x) {
  const double peak = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& value : x) sum += value = std::exp(value - peak);
  for (double& value : x) value /= sum;
  return x;
}

/// Which of `candidates` are among the lightest whose cumulative weight is <= tau. False in *clear where the
/// sum comes too near to tau for float32 to decide alike.
std::vector<int64_t> lightest(const std::vector<double>& weight, std::vector<int64_t> candidates, double tau,
                              bool* clear) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](int64_t a, int64_t b) { return weight[a] < weight[b]; });
  double mass = 0;
  size_t n = 0;
  while (n < candidates.size()) {
    mass += weight[candidates[n]];
    if (std::fabs(mass - tau) < 1e-5) *clear = false;
    if (mass > tau) break;
    ++n;
  }
  candidates.resize(n);
  return candidates;
}

struct Expected {
  std::vector<std::vector<bool>> active;             // [head][q block]
  std::vector<std::vector<std::vector<bool>>> kept;  // [head][q block][kv block]
};

/// One batch element, by the definitions in select.h.
Expected select_reference(const SelectArguments& a, const Array& q_mean, const Array& k_mean, int64_t b,
                          bool* clear) {
  const int64_t nq = q_mean.size(1), nkv = k_mean.size(1), heads = q_mean.size(2),
                group = heads / k_mean.size(2);
  const int64_t dim = q_mean.size(3), ratio = a.symbols.block_q / a.symbols.block_kv;
  const double scale = a.scale != 0 ? a.scale : 1 / std::sqrt(static_cast<double>(dim));
  const auto is_text = [&](int64_t block, int64_t size) {
    return block * size < a.text_start + a.text_length && (block + 1) * size > a.text_start &&
           a.text_length > 0;
  };
  const auto text_q = [&](int64_t i) { return is_text(i, a.symbols.block_q); };
  const auto text_kv = [&](int64_t j) { return is_text(j, a.symbols.block_kv); };
  Expected result;
  int64_t active_tiles = 0;
  for (int64_t h = 0; h < heads; ++h) {
    Matrix p(nq, std::vector<double>(nkv));
    for (int64_t i = 0; i < nq; ++i) {
      for (int64_t j = 0; j < nkv; ++j) {
        for (int64_t d = 0; d < dim; ++d) p[i][j] += scale * q_mean(b, i, h, d) * k_mean(b, j, h / group, d);
      }
    }
    std::vector<double> given(nq), taken(nq), share(nq);
    std::vector<int64_t> vision;
    for (int64_t i = 0; i < nq; ++i) {
      if (!text_q(i)) vision.push_back(i);
    }
    for (int64_t i = 0; i < nq; ++i) {
      if (!text_q(i)) continue;
      const std::vector<double> row = softmax(p[i]);
      for (int64_t j = 0; j < nkv; ++j) {
        if (!text_q(j / ratio)) given[j / ratio] += row[j];
      }
    }
    for (int64_t j = 0; j < nkv && !vision.empty(); ++j) {
      if (!text_kv(j)) continue;
      std::vector<double> column;
      for (const int64_t i : vision) column.push_back(p[i][j]);
      column = softmax(column);
      for (size_t n = 0; n < vision.size(); ++n) taken[vision[n]] += column[n];
    }
    const double all_given = std::accumulate(given.begin(), given.end(), 0.0);
    const double all_taken = std::accumulate(taken.begin(), taken.end(), 0.0);
    for (const int64_t i : vision) share[i] = (given[i] / all_given + taken[i] / all_taken) / 2;
    std::vector<bool> active(nq, true);
    if (a.text_length > 0 && a.tau_q > 0) {
      for (const int64_t i : lightest(share, vision, a.tau_q, clear)) active[i] = false;
    }
    std::vector<std::vector<bool>> kept(nq, std::vector<bool>(nkv, true));
    for (int64_t i = 0; i < nq; ++i) {
      active_tiles += active[i];
      if (!active[i]) kept[i].assign(nkv, false);
      if (!active[i] || text_q(i)) continue;
      const std::vector<double> row = softmax(p[i]);
      std::vector<int64_t> columns;
      for (int64_t j = 0; j < nkv; ++j) {
        if (!text_kv(j)) columns.push_back(j);
      }
      std::vector<int64_t> skipped = lightest(row, columns, a.tau_kv, clear);
      if (skipped.size() == static_cast<size_t>(nkv)) skipped.pop_back();
      for (const int64_t j : skipped) kept[i][j] = false;
    }
    result.active.push_back(active);
    result.kept.push_back(kept);
  }
  if (a.s_q > 0 &&
      static_cast<double>(active_tiles) <= static_cast<double>(a.s_q) * static_cast<double>(nq * heads)) {
    result.active.assign(heads, std::vector<bool>(nq, false));
    result.kept.assign(heads, std::vector<std::vector<bool>>(nq, std::vector<bool>(nkv, false)));
  }
  return result;
}

struct Selection {
  SymbolGeometry geometry;
  Array q_mean, k_mean;
  Masks masks;
  SelectArguments a;
};

void prepare(Selection& s, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
             int32_t block_q, int32_t block_kv, Random& random) {
  s.geometry.q_tokens = s.geometry.kv_tokens = tokens, s.geometry.heads = heads;
  s.geometry.block_q = block_q, s.geometry.block_kv = block_kv;
  s.q_mean = Array::random(DType::kFloat32, {batch, s.geometry.q_blocks(), heads, dim}, random);
  s.k_mean = Array::random(DType::kFloat32, {batch, s.geometry.kv_blocks(), kv_heads, dim}, random, 0.7);
  s.masks = Masks::random(s.geometry, batch, 0.5, 0.5, random);
  s.a.q_mean = s.q_mean, s.a.k_mean = s.k_mean, s.a.symbols = s.masks.symbols(), s.a.tokens = tokens;
}

TEST_P(SelectTest, MatchesTheDefinition) {
  Random random(92);
  int compared = 0;
  const int32_t blocks[][2] = {{128, 128}, {128, 64}, {64, 64}};
  for (int trial = 0; trial < 60; ++trial) {
    Selection s;
    const int64_t kv_heads = uniform(random, 1, 2), tokens = uniform(random, 60, 2500),
                  batch = uniform(random, 1, 2);
    const auto& block = blocks[trial % 3];
    prepare(s, batch, tokens, kv_heads * uniform(random, 1, 2), kv_heads, trial % 2 ? 64 : 128, block[0],
            block[1], random);
    if (trial % 5 != 0) {
      s.a.text_length = std::min(tokens, uniform(random, 1, 300));
      s.a.text_start = trial % 3 == 0 ? 0 : uniform(random, 0, tokens - s.a.text_length);
    }
    s.a.tau_q = static_cast<float>(uniform(random, 0, 9)) / 10,
    s.a.tau_kv = static_cast<float>(uniform(random, 0, 9)) / 10;
    s.a.s_q = trial % 4 == 0 ? 0.5f : 0.0f;
    s.a.scale = trial % 6 == 0 ? 0.3f : 0.0f;
    run_operator(select_flashomni_workspace, select_flashomni, s.a);
    for (int64_t b = 0; b < batch; ++b) {
      bool clear = true;
      const Expected expected = select_reference(s.a, s.q_mean, s.k_mean, b, &clear);
      if (!clear) continue;
      ++compared;
      for (int64_t h = 0; h < s.geometry.heads; ++h) {
        for (int64_t i = 0; i < s.geometry.q_blocks(); ++i) {
          ASSERT_EQ(s.masks.active(b, h, i), expected.active[h][i]) << trial << " tile " << h << ", " << i;
          for (int64_t j = 0; j < s.geometry.kv_blocks(); ++j) {
            ASSERT_EQ(s.masks.selected(b, h, i, j), expected.kept[h][i][j])
                << trial << " " << h << ", " << i << ", " << j;
          }
        }
      }
    }
  }
  EXPECT_GT(compared, 60);
}

TEST_P(SelectTest, ThresholdsAtTheirEnds) {
  Random random(93);
  Selection s;
  prepare(s, 1, 1000, 3, 3, 64, 128, 128, random);
  s.a.text_length = 77;
  run_operator(select_flashomni_workspace, select_flashomni, s.a);  // tau 0: everything is computed
  for (int64_t i = 0; i < s.geometry.cache_bits(); ++i) EXPECT_TRUE(BitRow(s.masks.cache_row(0), 0, 24)[i]);
  EXPECT_EQ(BitRow(s.masks.skip_row(0), 0, s.geometry.skip_bits()).count(), s.geometry.skip_bits());
  s.a.tau_q = s.a.tau_kv = 1;
  s.a.text_length = 0;  // no text: nothing is cached, and a row keeps its heaviest block
  run_operator(select_flashomni_workspace, select_flashomni, s.a);
  EXPECT_EQ(BitRow(s.masks.cache_row(0), 0, s.geometry.cache_bits()).count(), s.geometry.cache_bits());
  for (int64_t row = 0; row < s.geometry.cache_bits(); ++row) {
    EXPECT_GE(BitRow(s.masks.skip_row(0), row * 8, 8).count(), 1);
  }
}

TEST_P(SelectTest, NonFiniteScoresGiveValidSymbols) {
  Random random(94);
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity(), -1e38}) {
    Selection s;
    prepare(s, 1, 1000, 2, 2, 64, 128, 128, random);
    s.a.text_length = 130, s.a.tau_q = 0.6f, s.a.tau_kv = 0.6f;
    for (int64_t d = 0; d < 64; ++d) s.q_mean.set(bad, 0, 5, 0, d), s.k_mean.set(bad, 0, 3, 1, d);
    run_operator(select_flashomni_workspace, select_flashomni, s.a);
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t i = 0; i < 8; ++i) {
        int64_t kept = 0;
        for (int64_t j = 0; j < 8; ++j) kept += s.masks.selected(0, h, i, j);
        EXPECT_EQ(kept > 0, s.masks.active(0, h, i));
        if (i < 2) {
          EXPECT_EQ(kept, 8) << "a text row";
        }
      }
    }
  }
}

TEST(SummarizeTest, ShareOfBitsRowsAndElements) {
  Random random(95);
  const int32_t blocks[][2] = {{128, 128}, {128, 64}, {64, 64}};
  for (int trial = 0; trial < 60; ++trial) {
    SymbolGeometry g;
    g.q_tokens = uniform(random, 1, 3000), g.kv_tokens = uniform(random, 1, 6000);
    g.heads = uniform(random, 1, 30), g.block_q = blocks[trial % 3][0], g.block_kv = blocks[trial % 3][1];
    const int64_t batch = uniform(random, 1, 3), q_blocks = g.q_blocks(), kv_blocks = g.kv_blocks();
    const double densities[] = {0, 0.02, 0.5, 1};
    Masks masks = Masks::random(g, batch, densities[trial % 4], densities[trial / 4 % 4], random);
    for (int64_t b = 0; b < batch; ++b) {  // bits past the end, which nobody may look at
      for (int64_t i = g.cache_bits(); i < g.cache_bytes() * 8; ++i) write_bit(masks.cache_row(b), i, true);
      for (int64_t i = g.skip_bits(); i < g.skip_bytes() * 8; ++i) write_bit(masks.skip_row(b), i, true);
    }
    Array rows(DType::kUInt8, {batch, ceil_div(q_blocks, 8)}, 3), awake(DType::kUInt8, {batch});
    Array shares(DType::kFloat32, {2, g.heads}, 2);
    shares.poison();
    rows.fill([] { return 0xA5; }), awake.fill([] { return 0xA5; });
    SummarizeArguments a;
    a.symbols = masks.symbols(), a.heads = g.heads, a.q_tokens = g.q_tokens, a.kv_tokens = g.kv_tokens;
    a.rows = rows, a.shares = shares, a.awake = awake;
    Context context;
    context.threads = 1 + trial % 3;
    summarize_symbols(a, context);
    for (int64_t h = 0; h < g.heads; ++h) {
      double active = 0, selected = 0;
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < q_blocks; ++i) {
          if (!masks.active(b, h, i)) continue;
          ++active;
          for (int64_t j = 0; j < kv_blocks; ++j) selected += masks.selected(b, h, i, j);
        }
      }
      const double tiles = static_cast<double>(batch * q_blocks);
      ASSERT_EQ(shares(0, h), static_cast<float>(selected / (tiles * static_cast<double>(kv_blocks))));
      ASSERT_EQ(shares(1, h), static_cast<float>(active / tiles));
    }
    for (int64_t b = 0; b < batch; ++b) {
      bool any = false;
      for (int64_t i = 0; i < rows.size(1) * 8; ++i) {
        bool active = false;
        for (int64_t h = 0; i < q_blocks && h < g.heads; ++h) active |= masks.active(b, h, i);
        ASSERT_EQ(static_cast<int>(rows(b, i / 8)) >> (i % 8) & 1, active) << trial << " row " << i;
        any |= active;
      }
      ASSERT_EQ(awake(b), any);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, SelectTest, ::testing::ValuesIn(testing::instruction_sets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flashomni
