// The sparse linear layers against the float64 reference, on every instruction set of the chip.
#include "flashomni/gemm.h"

#include "tests/cpp/reference.h"
#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::Array;
using testing::Masks;
using testing::Random;
using testing::run_operator;
using testing::Sum;
using testing::tolerance;
using testing::uniform;

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

class GemmTest : public ::testing::TestWithParam<std::string> {
 protected:
  testing::ScopedVariable force_{"FLASHOMNI_CPU_ISA", GetParam()};
};

/// The rows [offset, offset + rows) of a joint sequence a little longer than that, and its tiles.
struct Rows {
  int64_t batch, rows, offset, heads;
  int32_t block;
  Masks masks;
  Rows(int64_t batch, int64_t rows, int64_t offset, int64_t heads, int32_t block, double density,
       Random& random)
      : batch(batch), rows(rows), offset(offset), heads(heads), block(block) {
    SymbolGeometry g;
    g.q_tokens = offset + rows + uniform(random, 0, 150), g.kv_tokens = 1, g.heads = heads;
    g.block_q = g.block_kv = block;
    masks = Masks::random(g, batch, density, 1, random);
  }
  bool active(int64_t b, int64_t row, int64_t head) const {
    return masks.active(b, head, (offset + row) / block);
  }
  TileSymbols tiles() const {
    TileSymbols t;
    t.cache = masks.cache_bits;
    t.heads = heads, t.tokens = masks.geometry.q_tokens, t.row_offset = offset, t.block_q = block;
    return t;
  }
};

double activated(double x, Activation activation) {
  if (activation == Activation::kGelu) return testing::gelu(x);
  return activation == Activation::kGeluTanh ? testing::gelu_tanh(x) : x;
}

void run_gemm_q(DType dtype, const Rows& r, int64_t k, int64_t n, bool with_bias, Activation activation,
                int64_t padding, int threads, bool with_symbols, Random& random) {
  SCOPED_TRACE(text("gemm_q ", name_of(dtype), " b", r.batch, " m", r.rows, " k", k, " n", n, " heads ",
                    r.heads, " offset ", r.offset, " block ", r.block, " activation ",
                    static_cast<int>(activation)));
  const Array x = Array::random(dtype, {r.batch, r.rows, k}, random, 1, padding);
  const Array weight = Array::random(dtype, {n, k}, random, 1 / std::sqrt(static_cast<double>(k)), padding);
  const Array bias = Array::random(dtype, {n}, random);
  Array out(dtype, {r.batch, r.rows, n}, padding);
  out.poison();
  GemmQArguments a;
  a.x = x, a.weight = weight, a.out = out, a.activation = activation;
  a.tiles = r.tiles();
  if (with_bias) a.bias = bias;
  if (!with_symbols) a.tiles.cache = TensorView{};
  run_operator(gemm_q_workspace, gemm_q, a, threads);
  const std::vector<double> xs = x.values(), ws = weight.values();
  for (int64_t b = 0; b < r.batch; ++b) {
    for (int64_t m = 0; m < r.rows; ++m) {
      for (int64_t j = 0; j < n; ++j) {
        if (with_symbols && !r.active(b, m, j / (n / r.heads))) {
          ASSERT_TRUE(std::isnan(out(b, m, j))) << "a cached tile was written";
          continue;
        }
        Sum sum;
        for (int64_t i = 0; i < k; ++i) sum.add(xs[(b * r.rows + m) * k + i] * ws[j * k + i]);
        if (with_bias) sum.add(bias(j));
        const double expected = activated(sum.value, activation);
        // Activations are a few float32 operations, whose slope is at most 1.13.
        const double steps = activation == Activation::kNone ? 0 : 1e-6 * (1 + std::fabs(sum.value));
        ASSERT_NEAR(out(b, m, j), expected, steps + tolerance(dtype, expected, 1.13 * sum.magnitude, k))
            << "[" << b << ", " << m << ", " << j << "]";
      }
    }
  }
}

TEST_P(GemmTest, QueryRandomShapes) {
  Random random(71);
  const int64_t offsets[] = {0, 16, 77, 128};
  for (int trial = 0; trial < 24; ++trial) {
    const int64_t heads = uniform(random, 1, 3);
    const Rows r(uniform(random, 1, 2), uniform(random, 1, 280), offsets[trial % 4], heads,
                 trial % 2 ? 64 : 128, std::vector<double>{0, 0.5, 1}[uniform(random, 0, 2)], random);
    const int64_t k = trial % 3 == 0 ? uniform(random, 1, 40) : uniform(random, 100, 450);
    run_gemm_q(kTypes[trial % 3], r, k, heads * uniform(random, 1, 140), trial % 4 != 0,
               static_cast<Activation>(uniform(random, 0, 2)), trial % 5 == 0 ? 8 : 0,
               static_cast<int>(uniform(random, 1, 3)), trial % 7 != 0, random);
  }
}

TEST_P(GemmTest, QueryEmpty) {
  Random random(72);
  run_gemm_q(DType::kFloat32, Rows(1, 0, 16, 2, 128, 0.5, random), 64, 128, true, Activation::kNone, 0, 2,
             true, random);
  run_gemm_q(DType::kFloat32, Rows(0, 9, 16, 2, 128, 0.5, random), 64, 128, true, Activation::kNone, 0, 2,
             true, random);
}

/// GEMM-O over one window: the Update, then a Dispatch with fresh inputs, on the same tiles.
void run_gemm_o(DType dtype, const Rows& r, int64_t head_dim, int64_t extra, int64_t n, int orders,
                bool with_bias, int threads, Random& random) {
  SCOPED_TRACE(text("gemm_o ", name_of(dtype), " b", r.batch, " m", r.rows, " heads ", r.heads, " dim ",
                    head_dim, " extra ", extra, " n", n, " orders ", orders, " offset ", r.offset, " block ",
                    r.block));
  const int64_t columns = r.heads * head_dim, k = columns + extra;
  const Array weight = Array::random(dtype, {n, k}, random, 1 / std::sqrt(static_cast<double>(k)));
  const Array bias = Array::random(dtype, {n}, random);
  std::vector<Array> o, cached;
  for (int i = 0; i < orders; ++i) {
    o.push_back(Array::random(dtype, {r.batch, r.rows, i == 0 ? k : columns + i % 2 * 8}, random));
    cached.emplace_back(dtype, std::vector<int64_t>{r.batch, r.rows, n});
    cached.back().poison();
  }
  Array out(dtype, {r.batch, r.rows, n});
  out.poison();
  GemmOUpdateArguments u;
  u.orders = orders, u.weight = weight, u.out = out, u.head_dim = head_dim, u.tiles = r.tiles();
  if (with_bias) u.bias = bias;
  for (int i = 0; i < orders; ++i)
    u.o[i] = o[static_cast<size_t>(i)], u.cached[i] = cached[static_cast<size_t>(i)];
  run_operator(gemm_o_update_workspace, gemm_o_update, u, threads);

  std::vector<Array> kept_cached;
  Array again(dtype, {r.batch, r.rows, n});
  again.poison();
  for (int i = 0; i < orders; ++i) {
    kept_cached.emplace_back(dtype, std::vector<int64_t>{r.batch, r.rows, n});
    kept_cached.back().poison();
    u.cached[i] = kept_cached.back();
  }
  u.out = again, u.keep_rows = true;
  run_operator(gemm_o_update_workspace, gemm_o_update, u, threads);

  const Array later = Array::random(dtype, {r.batch, r.rows, k}, random);
  const Array coefficients = Array::random(DType::kFloat32, {orders}, random);
  Array next(dtype, {r.batch, r.rows, n}), kept(dtype, {r.batch, r.rows, n});
  next.poison(), kept.poison();
  GemmODispatchArguments d;
  d.orders = orders, d.o = later, d.weight = weight, d.coefficients = coefficients, d.out = next;
  d.head_dim = head_dim, d.tiles = r.tiles();
  for (int i = 0; i < orders; ++i) d.cached[i] = cached[static_cast<size_t>(i)];
  run_operator(gemm_o_dispatch_workspace, gemm_o_dispatch, d, threads);
  d.out = kept, d.keep_rows = true;
  run_operator(gemm_o_dispatch_workspace, gemm_o_dispatch, d, threads);

  const std::vector<double> w = weight.values();
  // Adds the columns whose head's bit is `wanted`; columns past the heads are active.
  const auto add_heads = [&](Sum& sum, const std::vector<double>& x, int64_t width, int64_t b, int64_t m,
                             int64_t j, bool wanted) {
    for (int64_t i = 0; i < std::min(width, k); ++i) {
      const bool active = i >= columns || r.active(b, m, i / head_dim);
      if (i >= columns && width != k) break;
      if (active == wanted) sum.add(x[(b * r.rows + m) * width + i] * w[j * k + i]);
    }
  };
  std::vector<std::vector<double>> os;
  for (const Array& array : o) os.push_back(array.values());
  const std::vector<double> laters = later.values();
  for (int64_t b = 0; b < r.batch; ++b) {
    for (int64_t m = 0; m < r.rows; ++m) {
      for (int64_t j = 0; j < n; ++j) {
        Sum dense, forecast;
        for (int i = 0; i < orders; ++i) {
          Sum sum;
          if (i == 0 && with_bias) sum.add(bias(j));
          add_heads(sum, os[static_cast<size_t>(i)], o[static_cast<size_t>(i)].size(2), b, m, j, false);
          const double got = cached[static_cast<size_t>(i)](b, m, j);
          ASSERT_NEAR(got, sum.value, tolerance(dtype, sum.value, sum.magnitude, k)) << "cached[" << i << "]";
          if (i == 0) dense = sum;
          forecast.add(coefficients(i) * got);  // the stored value, rounded, is what a Dispatch sees
        }
        add_heads(dense, os[0], k, b, m, j, true);
        ASSERT_NEAR(out(b, m, j), dense.value, tolerance(dtype, dense.value, dense.magnitude, k)) << "update";
        add_heads(forecast, laters, k, b, m, j, true);
        ASSERT_NEAR(next(b, m, j), forecast.value, tolerance(dtype, forecast.value, forecast.magnitude, k))
            << "dispatch";
        bool written = false;
        for (int64_t h = 0; h < r.heads; ++h) written |= r.active(b, m, h);
        ASSERT_EQ(again(b, m, j), out(b, m, j)) << "update that keeps rows";
        for (int i = 0; i < orders; ++i) {
          const double got = kept_cached[static_cast<size_t>(i)](b, m, j);
          ASSERT_TRUE(written ? got == cached[static_cast<size_t>(i)](b, m, j) : std::isnan(got));
        }
        if (written) {
          ASSERT_EQ(kept(b, m, j), next(b, m, j)) << "dispatch that keeps rows";
        } else {
          ASSERT_TRUE(std::isnan(kept(b, m, j))) << "a row without an active head was written";
        }
      }
    }
  }
}

TEST_P(GemmTest, OutputRandomShapes) {
  Random random(81);
  const int64_t offsets[] = {0, 16, 77};
  for (int trial = 0; trial < 20; ++trial) {
    const Rows r(uniform(random, 1, 2), uniform(random, 1, 200), offsets[trial % 3], uniform(random, 1, 3),
                 trial % 2 ? 64 : 128, std::vector<double>{0, 0.5, 1}[uniform(random, 0, 2)], random);
    const int64_t head_dim = std::vector<int64_t>{64, 72, 96, 24}[trial % 4];
    run_gemm_o(kTypes[trial % 3], r, head_dim, trial % 2 ? uniform(random, 1, 130) : 0,
               uniform(random, 1, 200), 1 + trial % 4, trial % 5 != 0,
               static_cast<int>(uniform(random, 1, 3)), random);
  }
}

TEST_P(GemmTest, OutputEmpty) {
  Random random(82);
  run_gemm_o(DType::kFloat32, Rows(1, 0, 16, 2, 128, 0.5, random), 64, 0, 64, 2, true, 2, random);
}

TEST_P(GemmTest, DispatchIgnoresOrdersWithoutHistory) {
  Random random(83);
  const Rows r(1, 50, 0, 1, 64, 0, random);
  const Array o = Array::random(DType::kFloat32, {1, 50, 64}, random),
              w = Array::random(DType::kFloat32, {32, 64}, random);
  const Array first = Array::random(DType::kFloat32, {1, 50, 32}, random);
  Array second(DType::kFloat32, {1, 50, 32}), out(DType::kFloat32, {1, 50, 32}), c(DType::kFloat32, {2});
  second.poison();
  c.set(1, 0), c.set(0, 1);
  GemmODispatchArguments d;
  d.orders = 2, d.o = o, d.weight = w, d.coefficients = c, d.out = out, d.head_dim = 64, d.tiles = r.tiles();
  d.cached[0] = first, d.cached[1] = second;
  run_operator(gemm_o_dispatch_workspace, gemm_o_dispatch, d);
  EXPECT_EQ(out.storage(), first.storage());
}

INSTANTIATE_TEST_SUITE_P(Isa, GemmTest, ::testing::ValuesIn(testing::instruction_sets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flashomni
