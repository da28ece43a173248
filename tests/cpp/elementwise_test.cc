// QK norm with RoPE, and forecasting, against the float64 reference.
#include "flashomni/forecast.h"
#include "flashomni/select.h"
#include "tests/cpp/reference.h"
#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::Array;
using testing::Masks;
using testing::Random;
using testing::rounding;
using testing::uniform;

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

class ElementwiseTest : public ::testing::TestWithParam<std::string> {
 protected:
  testing::ScopedVariable force_{"FLASHOMNI_CPU_ISA", GetParam()};
};

TEST_P(ElementwiseTest, NormRope) {
  Random random(95);
  for (int trial = 0; trial < 24; ++trial) {
    const DType dtype = kTypes[trial % 3];
    const int64_t dim = std::vector<int64_t>{64, 72, 128, 256}[trial % 4], rows = uniform(random, 1, 200),
                  heads = 3;
    const int64_t offset = std::vector<int64_t>{0, 16, 77}[trial % 3],
                  tokens = offset + rows + uniform(random, 0, 99);
    const bool norm = trial % 5 != 0, rotate = trial % 7 != 0, symbols = trial % 2 == 0;
    SymbolGeometry g;
    g.q_tokens = tokens, g.kv_tokens = 1, g.heads = heads, g.block_q = g.block_kv = trial % 2 ? 64 : 128;
    const Masks masks = Masks::random(g, 2, 0.5, 1, random);
    Array x = Array::random(dtype, {2, rows, heads, dim}, random, 2, 8);
    const Array before = x, weight = Array::random(dtype, {dim}, random);
    const Array cosine = Array::random(DType::kFloat32, {tokens, dim}, random);
    const Array sine = Array::random(DType::kFloat32, {tokens, dim}, random);
    NormRopeArguments a;
    a.x = x, a.eps = 1e-5f, a.row_offset = offset, a.tokens = tokens, a.block_q = g.block_q;
    if (norm) a.weight = weight;
    if (rotate) a.cos = cosine, a.sin = sine;
    if (symbols) a.cache = masks.cache_bits;
    norm_rope(a, Context{});
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          const bool active = !symbols || masks.active(b, h, (offset + t) / g.block_q);
          double squares = 0;
          for (int64_t d = 0; d < dim; ++d) squares += before(b, t, h, d) * before(b, t, h, d);
          const double factor = 1 / std::sqrt(squares / static_cast<double>(dim) + 1e-5);
          const auto normed = [&](int64_t d) { return before(b, t, h, d) * (norm ? factor * weight(d) : 1); };
          for (int64_t d = 0; d < dim; ++d) {
            if (!active) {
              ASSERT_EQ(x(b, t, h, d), before(b, t, h, d)) << "a cached tile was written";
              continue;
            }
            double expected = normed(d), magnitude = std::fabs(expected);
            if (rotate) {
              const double turned = (d % 2 == 0 ? -normed(d + 1) : normed(d - 1)) * sine(offset + t, d);
              expected = normed(d) * cosine(offset + t, d) + turned;
              magnitude = std::fabs(normed(d) * cosine(offset + t, d)) + std::fabs(turned);
            }
            ASSERT_NEAR(x(b, t, h, d), expected, testing::tolerance(dtype, expected, magnitude, 16));
          }
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, TaylorUpdateTakesDifferences) {
  Random random(96);
  for (int trial = 0; trial < 24; ++trial) {
    const DType dtype = kTypes[trial % 3];
    const int32_t orders = 1 + trial % 4, valid = static_cast<int32_t>(uniform(random, 0, orders - 1));
    const std::vector<int64_t> shape = {2, uniform(random, 1, 40), uniform(random, 1, 600)};
    const Array feature = Array::random(dtype, shape, random, 1, 8);
    std::vector<Array> derivatives, before;
    TaylorUpdateArguments a;
    a.feature = feature, a.orders = orders, a.valid = valid,
    a.gap = static_cast<float>(uniform(random, 1, 6));
    for (int i = 0; i < orders; ++i) {
      derivatives.push_back(Array::random(dtype, shape, random));
      if (i >= valid) derivatives.back().poison();  // no history: never read
    }
    before = derivatives;
    for (int i = 0; i < orders; ++i) a.derivatives[i] = derivatives[static_cast<size_t>(i)];
    taylor_update(a, Context{});
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t t = 0; t < shape[1]; ++t) {
        for (int64_t d = 0; d < shape[2]; ++d) {
          double expected = feature(b, t, d), error = 0;
          for (size_t i = 0; i < static_cast<size_t>(orders); ++i) {
            if (i > static_cast<size_t>(valid)) expected = error = 0;
            ASSERT_NEAR(derivatives[i](b, t, d), expected,
                        error + 1.01 * rounding(dtype) * std::fabs(expected))
                << "order " << i << " of " << orders << ", valid " << valid;
            const double old = i < static_cast<size_t>(valid) ? before[i](b, t, d) : 0;
            // A kernel may go on from the float32 value or from the one that it stored.
            error = (error + rounding(dtype) * std::fabs(expected)) / a.gap +
                    2 * rounding(DType::kFloat32) * (std::fabs(expected) + std::fabs(old));
            expected = (expected - old) / a.gap;
          }
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, TaylorForecastIsTheSum) {
  Random random(97);
  for (int trial = 0; trial < 24; ++trial) {
    const DType dtype = kTypes[trial % 3];
    const int32_t orders = 1 + trial % 4;
    const std::vector<int64_t> shape = {uniform(random, 1, 40), uniform(random, 1, 600)};
    Array coefficients = Array::random(DType::kFloat32, {orders}, random), out(dtype, shape, 8);
    std::vector<Array> derivatives;
    TaylorForecastArguments a;
    for (int i = 0; i < orders; ++i) derivatives.push_back(Array::random(dtype, shape, random));
    if (trial % 5 == 0) {
      derivatives.back().poison();  // an order without history may hold anything
      coefficients.set(0, orders - 1);
    }
    for (int i = 0; i < orders; ++i) a.derivatives[i] = derivatives[static_cast<size_t>(i)];
    a.orders = orders, a.coefficients = coefficients, a.out = out;
    out.poison();
    taylor_forecast(a, Context{});
    for (int64_t t = 0; t < shape[0]; ++t) {
      for (int64_t d = 0; d < shape[1]; ++d) {
        testing::Sum sum;
        for (int i = 0; i < orders; ++i) {
          if (coefficients(i) != 0) sum.add(coefficients(i) * derivatives[static_cast<size_t>(i)](t, d));
        }
        ASSERT_NEAR(out(t, d), sum.value, testing::tolerance(dtype, sum.value, sum.magnitude, 4));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, ElementwiseTest, ::testing::ValuesIn(testing::instruction_sets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flashomni
