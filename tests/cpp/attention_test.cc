// Attention against the float64 reference, on every instruction set of the chip.
#include "flashomni/attention.h"

#include "tests/cpp/reference.h"
#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::Array;
using testing::Column;
using testing::Masks;
using testing::Random;
using testing::run_operator;
using testing::uniform;

/// One batch of attention: what is drawn, run and compared.
struct Case {
  DType dtype = DType::kFloat32;
  int64_t batch = 1, heads = 2, kv_heads = 2, dim = 64;
  int64_t q_tokens = 100, kv_tokens = 100;
  int32_t block_q = 128, block_kv = 128;
  double cache_density = 0.7, skip_density = 0.5;
  bool causal = false, summaries = false, short_blocks = false, symbols = true;
  float scale = 0;
  int64_t padding = 0;
  int threads = 2;

  std::string name() const {
    return text(name_of(dtype), " b", batch, " h", heads, "/", kv_heads, " d", dim, " ", q_tokens, "x",
                kv_tokens, " blocks ", block_q, "x", block_kv, causal ? " causal" : "",
                summaries ? " summaries" : "", short_blocks ? " short blocks" : "");
  }
};

void run_case(const Case& c, uint64_t seed) {
  SCOPED_TRACE(c.name());
  Random random(seed);
  const double nan = std::nan("");
  SymbolGeometry g;
  g.q_tokens = c.q_tokens, g.kv_tokens = c.kv_tokens, g.heads = c.heads;
  g.block_q = c.block_q, g.block_kv = c.block_kv;
  const Masks masks =
      Masks::random(g, c.batch, c.symbols ? c.cache_density : 1, c.symbols ? c.skip_density : 1, random);
  const Array q = Array::random(c.dtype, {c.batch, c.q_tokens, c.heads, c.dim}, random, 1, c.padding);
  Array k = Array::random(c.dtype, {c.batch, c.kv_tokens, c.kv_heads, c.dim}, random, 1, c.padding);
  Array v = Array::random(c.dtype, {c.batch, c.kv_tokens, c.kv_heads, c.dim}, random, 1, c.padding);
  Array out(c.dtype, {c.batch, c.q_tokens, c.heads, c.dim}, c.padding);
  Array lse(DType::kFloat32, {c.batch, c.q_tokens, c.heads});
  out.poison();
  lse.poison();

  // Valid tokens of each block; the rest of a short block is poison that nobody may read into a result.
  std::vector<int32_t> lengths;
  for (int64_t j = 0; j < g.kv_blocks(); ++j) {
    const int64_t slots = std::min<int64_t>(c.block_kv, c.kv_tokens - j * c.block_kv);
    lengths.push_back(static_cast<int32_t>(c.short_blocks ? uniform(random, 0, slots) : slots));
  }
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t t = 0; t < c.kv_tokens; ++t) {
      if (t % c.block_kv < lengths[t / c.block_kv]) continue;
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        for (int64_t d = 0; d < c.dim; ++d) k.set(nan, b, t, h, d), v.set(nan, b, t, h, d);
      }
    }
  }
  const Array block_len = Array::ints(lengths);
  const Array k_mean = Array::random(DType::kFloat32, {c.batch, g.kv_blocks(), c.kv_heads, c.dim}, random);
  const Array v_mean = Array::random(DType::kFloat32, {c.batch, g.kv_blocks(), c.kv_heads, c.dim}, random);

  AttentionArguments a;
  a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse;
  if (c.symbols) a.symbols = masks.symbols();
  a.symbols.block_q = c.block_q, a.symbols.block_kv = c.block_kv;
  a.scale = c.scale;
  a.causal = c.causal;
  if (c.summaries) a.k_mean = k_mean, a.v_mean = v_mean;
  if (c.short_blocks) a.kv_block_len = block_len;
  run_operator(attention_workspace, attention, a, c.threads);

  const double scale = c.scale != 0 ? c.scale : 1 / std::sqrt(static_cast<double>(c.dim));
  const int64_t group = c.heads / c.kv_heads;
  const std::vector<double> queries = q.values(), keys = k.values(), values = v.values();
  const std::vector<double> key_means = k_mean.values(), value_means = v_mean.values();
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t t = 0; t < c.q_tokens; ++t) {
        const int64_t i = t / c.block_q;
        if (!masks.active(b, h, i)) {
          for (int64_t d = 0; d < c.dim; ++d)
            ASSERT_TRUE(std::isnan(out(b, t, h, d))) << "a cached tile was written";
          ASSERT_TRUE(std::isnan(lse(b, t, h)));
          continue;
        }
        const int64_t last = c.causal ? t + c.kv_tokens - c.q_tokens : c.kv_tokens - 1;
        std::vector<Column> columns;
        for (int64_t j = 0; j < g.kv_blocks(); ++j) {
          const int64_t first = j * c.block_kv;
          if (masks.selected(b, h, i, j)) {
            for (int64_t s = first; s < first + lengths[j] && s <= last; ++s) {
              const int64_t at = ((b * c.kv_tokens + s) * c.kv_heads + h / group) * c.dim;
              columns.push_back({&keys[at], &values[at]});
            }
          } else if (c.summaries && lengths[j] > 0) {
            const int64_t at = ((b * g.kv_blocks() + j) * c.kv_heads + h / group) * c.dim;
            columns.push_back({&key_means[at], &value_means[at], static_cast<double>(lengths[j])});
          }
        }
        const auto row =
            attention_row(&queries[((b * c.q_tokens + t) * c.heads + h) * c.dim], columns, c.dim, scale);
        for (int64_t d = 0; d < c.dim; ++d) {
          // Probabilities, or the summaries' keys and values, may be rounded to the type on the way: each
          // moves its term by a rounding, a key's by the score's magnitude too.
          const double allowed =
              testing::tolerance(c.dtype, row.out[d], row.magnitude[d], c.dim, c.summaries ? 8 : 2);
          ASSERT_NEAR(out(b, t, h, d), row.out[d], allowed)
              << "[" << b << ", " << t << ", " << h << ", " << d << "]";
        }
        if (columns.empty()) {
          ASSERT_EQ(lse(b, t, h), -std::numeric_limits<double>::infinity());
        } else {
          ASSERT_NEAR(lse(b, t, h), row.lse2, 2e-5 + (c.summaries ? 8 * testing::rounding(c.dtype) : 0));
        }
      }
    }
  }
}

class AttentionTest : public ::testing::TestWithParam<std::string> {
 protected:
  testing::ScopedVariable force_{"FLASHOMNI_CPU_ISA", GetParam()};
};

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr int32_t kBlocks[][2] = {{128, 128}, {128, 64}, {64, 64}};

TEST_P(AttentionTest, EveryHeadDimAndType) {
  for (const DType dtype : kTypes) {
    for (const int64_t dim : {64, 72, 80, 96, 128, 256}) {
      Case c;
      c.dtype = dtype, c.dim = dim, c.q_tokens = 141, c.kv_tokens = 203, c.block_kv = 64;
      c.skip_density = 0.6;
      run_case(c, static_cast<uint64_t>(dim));
    }
  }
}

TEST_P(AttentionTest, RandomLengthsBlocksAndDensities) {
  Random random(11);
  for (int trial = 0; trial < 40; ++trial) {
    Case c;
    c.dtype = kTypes[trial % 3];
    c.batch = uniform(random, 1, 2);
    c.kv_heads = uniform(random, 1, 2);
    c.heads = c.kv_heads * uniform(random, 1, 3);
    c.q_tokens = uniform(random, 1, 300), c.kv_tokens = uniform(random, 1, 300);
    const auto& blocks = kBlocks[uniform(random, 0, 2)];
    c.block_q = blocks[0], c.block_kv = blocks[1];
    c.cache_density = std::vector<double>{0, 0.5, 1}[uniform(random, 0, 2)];
    c.skip_density = std::vector<double>{0, 0.1, 0.5, 1}[uniform(random, 0, 3)];
    c.causal = uniform(random, 0, 3) == 0;
    c.summaries = uniform(random, 0, 3) == 0;
    c.short_blocks = uniform(random, 0, 3) == 0;
    c.symbols = uniform(random, 0, 4) != 0;
    c.scale = uniform(random, 0, 1) ? 0.0f : 0.21f;
    c.padding = uniform(random, 0, 1) * 8;
    c.threads = static_cast<int>(uniform(random, 1, 3));
    run_case(c, 100 + static_cast<uint64_t>(trial));
  }
}

TEST_P(AttentionTest, EveryOddLength) {
  for (int64_t tokens = 1; tokens <= 300; tokens += tokens < 20 ? 1 : 23) {
    Case c;
    c.heads = c.kv_heads = 1;
    c.dtype = kTypes[tokens % 3];
    c.q_tokens = tokens, c.kv_tokens = 301 - tokens;
    c.block_q = 64, c.block_kv = 64;
    c.cache_density = 0.9;
    run_case(c, static_cast<uint64_t>(tokens));
  }
}

TEST_P(AttentionTest, CausalWithMoreQueriesThanKeysHasEmptyRows) {
  for (const DType dtype : kTypes) {
    Case c;
    c.dtype = dtype, c.causal = true, c.cache_density = 1, c.skip_density = 0.8;
    c.q_tokens = 150, c.kv_tokens = 70, c.block_q = 64, c.block_kv = 64;
    run_case(c, 21);
    c.q_tokens = 70, c.kv_tokens = 250;
    run_case(c, 22);
  }
}

TEST_P(AttentionTest, NoKeysAtAll) {
  Case c;
  c.kv_tokens = 0, c.q_tokens = 65, c.cache_density = 0.6;
  run_case(c, 31);
}

TEST_P(AttentionTest, NoQueries) {
  Case c;
  c.q_tokens = 0;
  run_case(c, 32);
  c.q_tokens = 10, c.batch = 0;
  run_case(c, 33);
}

TEST_P(AttentionTest, LargeScoresStayFinite) {
  Random random(41);
  const Array q = Array::random(DType::kFloat32, {1, 40, 1, 64}, random, 3);
  const Array k = Array::random(DType::kFloat32, {1, 90, 1, 64}, random, 3);
  const Array v = Array::random(DType::kFloat32, {1, 90, 1, 64}, random);
  Array out(DType::kFloat32, {1, 40, 1, 64});
  AttentionArguments a;
  a.q = q, a.k = k, a.v = v, a.out = out, a.scale = 30;
  run_operator(attention_workspace, attention, a);
  for (int64_t t = 0; t < 40; ++t) {
    for (int64_t d = 0; d < 64; ++d) ASSERT_TRUE(std::isfinite(out(0, t, 0, d)));
  }
}

TEST_P(AttentionTest, CachedRowsStayToTheBit) {
  Random random(51);
  SymbolGeometry g;
  g.q_tokens = g.kv_tokens = 300, g.heads = 2;
  Masks masks = Masks::random(g, 1, 0, 0.5, random);
  write_bit(masks.cache_row(0), 3, true);  // block 1, head 1
  for (const DType dtype : kTypes) {
    const Array x = Array::random(dtype, {1, 300, 2, 64}, random);
    Array out = Array::random(dtype, {1, 300, 2, 64}, random);
    Array lse = Array::random(DType::kFloat32, {1, 300, 2}, random);
    const Array out_before = out, lse_before = lse;
    AttentionArguments a;
    a.q = x, a.k = x, a.v = x, a.out = out, a.lse = lse, a.symbols = masks.symbols();
    run_operator(attention_workspace, attention, a);
    int64_t changed = 0;
    for (int64_t t = 0; t < 300; ++t) {
      for (int64_t h = 0; h < 2; ++h) {
        const bool active = h == 1 && t / 128 == 1;
        for (int64_t d = 0; d < 64; ++d) {
          const bool same = out(0, t, h, d) == out_before(0, t, h, d);
          ASSERT_TRUE(same || active);
          changed += !same;
        }
        ASSERT_TRUE(active || lse(0, t, h) == lse_before(0, t, h));
      }
    }
    EXPECT_GT(changed, 128 * 60);
  }
}

TEST_P(AttentionTest, RaggedEqualsItsElements) {
  Random random(61);
  const std::vector<int32_t> q_ends = {0, 70, 70, 263, 264}, kv_ends = {0, 129, 140, 140, 301};
  const int64_t heads = 4, kv_heads = 2, dim = 64;
  for (const DType dtype : kTypes) {
    // Two rows of slack behind the last element: they belong to nobody.
    const Array q = Array::random(dtype, {266, heads, dim}, random),
                k = Array::random(dtype, {303, kv_heads, dim}, random);
    const Array v = Array::random(dtype, {303, kv_heads, dim}, random);
    Array out(dtype, {266, heads, dim}), lse(DType::kFloat32, {266, heads});
    out.poison(), lse.poison();
    std::vector<uint8_t> cache, skip;
    std::vector<int32_t> cache_ends = {0}, skip_ends = {0};
    std::vector<Masks> masks;
    for (int b = 0; b < 4; ++b) {
      SymbolGeometry g;
      g.q_tokens = q_ends[b + 1] - q_ends[b], g.kv_tokens = kv_ends[b + 1] - kv_ends[b], g.heads = heads;
      g.block_kv = 64;
      masks.push_back(Masks::random(g, 1, 0.7, 0.6, random));
      const auto &c = masks.back().cache_bits.storage(), &s = masks.back().skip_bits.storage();
      cache.insert(cache.end(), c.begin(), c.begin() + g.cache_bytes());
      skip.insert(skip.end(), s.begin(), s.begin() + g.skip_bytes());
      cache_ends.push_back(static_cast<int32_t>(cache.size())),
          skip_ends.push_back(static_cast<int32_t>(skip.size()));
    }
    const Array q_indptr = Array::ints(q_ends), kv_indptr = Array::ints(kv_ends);
    const Array cache_indptr = Array::ints(cache_ends), skip_indptr = Array::ints(skip_ends);
    AttentionArguments a;
    a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse, a.q_indptr = q_indptr, a.kv_indptr = kv_indptr;
    a.symbols.cache = make_view(cache.data(), DType::kUInt8, {static_cast<int64_t>(cache.size())});
    a.symbols.skip = make_view(skip.data(), DType::kUInt8, {static_cast<int64_t>(skip.size())});
    a.symbols.cache_indptr = cache_indptr, a.symbols.skip_indptr = skip_indptr;
    a.symbols.block_kv = 64;
    run_operator(attention_workspace, attention, a);

    for (int b = 0; b < 4; ++b) {
      const int64_t n = q_ends[b + 1] - q_ends[b], m = kv_ends[b + 1] - kv_ends[b];
      Array alone(dtype, {1, n, heads, dim}), alone_lse(DType::kFloat32, {1, n, heads});
      alone.poison(), alone_lse.poison();
      const auto part = [&](const Array& x, int64_t first, int64_t rows, int64_t h) {
        return make_view(static_cast<char*>(x.view().data) + first * h * dim * bytes_of(dtype), dtype,
                         {1, rows, h, dim});
      };
      AttentionArguments one;
      one.q = part(q, q_ends[b], n, heads), one.k = part(k, kv_ends[b], m, kv_heads);
      one.v = part(v, kv_ends[b], m, kv_heads), one.out = alone, one.lse = alone_lse;
      one.symbols = masks[static_cast<size_t>(b)].symbols();
      run_operator(attention_workspace, attention, one);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t d = 0; d < dim; ++d) {
            const double x = out(q_ends[b] + t, h, d), y = alone(0, t, h, d);
            ASSERT_TRUE(x == y || (std::isnan(x) && std::isnan(y))) << x << " " << y;
          }
          const double x = lse(q_ends[b] + t, h), y = alone_lse(0, t, h);
          ASSERT_TRUE(x == y || (std::isnan(x) && std::isnan(y))) << x << " " << y;
        }
      }
    }
    for (int64_t d = 0; d < dim; ++d) ASSERT_TRUE(std::isnan(out(264, 0, d)) && std::isnan(out(265, 3, d)));
  }
}

// One thread takes runs of several tiles, which share packed blocks; many threads take tiles one by one.
TEST_P(AttentionTest, RunsOfTiles) {
  for (const DType dtype : kTypes) {
    Case c;
    c.dtype = dtype, c.heads = 4, c.q_tokens = 350, c.kv_tokens = 333;
    c.block_q = 64, c.block_kv = 64, c.threads = 1;
    run_case(c, 71);
    c.causal = true;
    run_case(c, 72);
    c.causal = false, c.summaries = true, c.short_blocks = true;
    run_case(c, 73);
  }
}

TEST_P(AttentionTest, ThreadsDoNotChangeTheBits) {
  Random random(81);
  SymbolGeometry g;
  g.q_tokens = g.kv_tokens = 350, g.heads = 4, g.block_q = g.block_kv = 64;
  const Masks masks = Masks::random(g, 1, 0.8, 0.6, random);
  for (const DType dtype : kTypes) {
    const Array q = Array::random(dtype, {1, 350, 4, 64}, random),
                k = Array::random(dtype, {1, 350, 2, 64}, random);
    const Array v = Array::random(dtype, {1, 350, 2, 64}, random);
    std::vector<double> outs[2], lses[2];
    for (const int i : {0, 1}) {
      Array out(dtype, {1, 350, 4, 64}), lse(DType::kFloat32, {1, 350, 4});
      AttentionArguments a;
      a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse, a.symbols = masks.symbols();
      a.symbols.block_q = a.symbols.block_kv = 64;
      run_operator(attention_workspace, attention, a, i == 0 ? 1 : 16);
      outs[i] = out.values(), lses[i] = lse.values();
    }
    EXPECT_EQ(outs[0], outs[1]) << name_of(dtype);
    EXPECT_EQ(lses[0], lses[1]) << name_of(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, ::testing::ValuesIn(testing::instruction_sets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flashomni
