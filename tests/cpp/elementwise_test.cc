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

enum class Over { kNothing, kHead, kAllHeads };

/// Rows [B, N, H, D] to norm, with the weight for it, and as they were.
struct Normed {
  Array x, before, weight;
  Over over;

  static Normed random(DType dtype, const std::vector<int64_t>& shape, Over over, Random& random) {
    const Array x = Array::random(dtype, shape, random, 2, 8);
    const int64_t width = over == Over::kAllHeads ? shape[2] * shape[3] : shape[3];
    return {x, x, Array::random(dtype, {width}, random), over};
  }
  int64_t heads() const { return x.view().size(2); }
  int64_t dim() const { return x.view().size(3); }
  TensorView weight_view() const { return over == Over::kNothing ? TensorView{} : weight.view(); }

  /// What a head of a token is before it is rotated.
  std::vector<double> expected(int64_t b, int64_t t, int64_t h) const {
    const bool all = over == Over::kAllHeads;
    double squares = 0;
    for (int64_t head = all ? 0 : h; head < (all ? heads() : h + 1); ++head) {
      for (int64_t d = 0; d < dim(); ++d) squares += before(b, t, head, d) * before(b, t, head, d);
    }
    const double factor = 1 / std::sqrt(squares / static_cast<double>((all ? heads() : 1) * dim()) + 1e-5);
    std::vector<double> row;
    for (int64_t d = 0; d < dim(); ++d) {
      row.push_back(before(b, t, h, d));
      if (over != Over::kNothing) row.back() *= factor * weight(all ? h * dim() + d : d);
    }
    return row;
  }
};

TEST_P(ElementwiseTest, NormRope) {
  constexpr Over kOvers[] = {Over::kHead, Over::kAllHeads, Over::kNothing};
  Random random(95);
  for (int trial = 0; trial < 36; ++trial) {
    const DType dtype = kTypes[trial % 3];
    const int64_t dim = std::vector<int64_t>{64, 72, 128, 256}[trial % 4], rows = uniform(random, 1, 200);
    const int64_t offset = std::vector<int64_t>{0, 16, 77}[trial % 3],
                  tokens = offset + rows + uniform(random, 0, 99);
    const Over over = kOvers[trial / 3 % 3], keys_over = kOvers[trial / 9 % 3];
    const bool rotate = trial % 7 != 0, symbols = trial % 2 == 0, with_keys = trial % 5 != 0;
    SymbolGeometry g;
    g.q_tokens = tokens, g.kv_tokens = 1, g.heads = 3, g.block_q = g.block_kv = trial % 4 > 1 ? 64 : 128;
    const Masks masks = Masks::random(g, 2, 0.5, 1, random);
    std::vector<Normed> tensors = {Normed::random(dtype, {2, rows, g.heads, dim}, over, random)};
    const Array cosine = Array::random(DType::kFloat32, {tokens, dim}, random);
    const Array sine = Array::random(DType::kFloat32, {tokens, dim}, random);
    if (with_keys) tensors.push_back(Normed::random(dtype, {2, rows, 2, dim}, keys_over, random));
    NormRopeArguments a;
    a.x = tensors[0].x, a.weight = tensors[0].weight_view();
    a.eps = 1e-5f, a.row_offset = offset, a.tokens = tokens, a.block_q = g.block_q;
    if (rotate) a.cos = cosine, a.sin = sine;
    if (symbols) a.cache = masks.cache_bits;
    if (with_keys) a.keys = tensors[1].x, a.keys_weight = tensors[1].weight_view();
    norm_rope(a, Context{});
    for (const Normed& of : tensors) {
      const bool sparse = symbols && &of == &tensors[0];
      for (int64_t b = 0; b < 2; ++b) {
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t h = 0; h < of.heads(); ++h) {
            if (sparse && !masks.active(b, h, (offset + t) / g.block_q)) {
              for (int64_t d = 0; d < dim; ++d)
                ASSERT_EQ(of.x(b, t, h, d), of.before(b, t, h, d)) << "a cached tile was written";
              continue;
            }
            const std::vector<double> row = of.expected(b, t, h);
            for (int64_t d = 0; d < dim; ++d) {
              const auto at = static_cast<size_t>(d);
              double expected = row[at], magnitude = std::fabs(expected);
              if (rotate) {
                const double turned = (d % 2 == 0 ? -row[at + 1] : row[at - 1]) * sine(offset + t, d);
                expected = row[at] * cosine(offset + t, d) + turned;
                magnitude = std::fabs(row[at] * cosine(offset + t, d)) + std::fabs(turned);
              }
              ASSERT_NEAR(of.x(b, t, h, d), expected, testing::tolerance(dtype, expected, magnitude, 16));
            }
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
    const bool with_last = trial % 2 == 0;
    const int32_t orders = 1 + trial % 4,
                  valid = static_cast<int32_t>(uniform(random, 0, orders - (with_last ? 0 : 1)));
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
    if (with_last) {
      derivatives.emplace_back(dtype, shape, 8);
      derivatives.back().poison();
    }
    before = derivatives;
    for (int i = 0; i < orders; ++i) a.derivatives[i] = derivatives[static_cast<size_t>(i)];
    if (with_last) a.last = derivatives.back();
    taylor_update(a, Context{});
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t t = 0; t < shape[1]; ++t) {
        for (int64_t d = 0; d < shape[2]; ++d) {
          double expected = feature(b, t, d), error = 0;
          for (size_t i = 0; i < derivatives.size(); ++i) {
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

TEST_P(ElementwiseTest, TaylorForecastOfSomeRowsLeavesTheOthers) {
  Random random(98);
  for (int trial = 0; trial < 24; ++trial) {
    const DType dtype = kTypes[trial % 3];
    const int32_t orders = 1 + trial % 4;
    const int64_t rows = uniform(random, 1, 300), width = uniform(random, 1, 300),
                  offset = uniform(random, 0, 200);
    SymbolGeometry g;
    g.q_tokens = offset + rows + uniform(random, 0, 99), g.kv_tokens = 1, g.heads = 1;
    g.block_q = g.block_kv = trial % 2 ? 64 : 128;
    const Masks masks =
        Masks::random(g, 2, std::vector<double>{0, 0.5, 1}[static_cast<size_t>(trial % 3)], 1, random);
    const Array coefficients = Array::random(DType::kFloat32, {orders}, random);
    Array out = Array::random(dtype, {2, rows, width}, random, 1, 8);
    const Array before = out;
    std::vector<Array> derivatives;
    TaylorForecastArguments a;
    for (int i = 0; i < orders; ++i) derivatives.push_back(Array::random(dtype, {2, rows, width}, random));
    for (int i = 0; i < orders; ++i) a.derivatives[i] = derivatives[static_cast<size_t>(i)];
    a.orders = orders, a.coefficients = coefficients, a.out = out;
    a.rows = trial % 4 < 2 ? ForecastRows::kCached : ForecastRows::kActive;
    a.tiles.cache = masks.cache_bits, a.tiles.tokens = g.q_tokens, a.tiles.row_offset = offset,
    a.tiles.block_q = g.block_q;
    taylor_forecast(a, Context{});
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t t = 0; t < rows; ++t) {
        const bool active = masks.active(b, 0, (offset + t) / g.block_q);
        for (int64_t d = 0; d < width; ++d) {
          if (active != (a.rows == ForecastRows::kActive)) {
            ASSERT_EQ(out(b, t, d), before(b, t, d)) << "a row that was left out was written";
            continue;
          }
          testing::Sum sum;
          for (int i = 0; i < orders; ++i)
            sum.add(coefficients(i) * derivatives[static_cast<size_t>(i)](b, t, d));
          ASSERT_NEAR(out(b, t, d), sum.value, testing::tolerance(dtype, sum.value, sum.magnitude, 4));
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, DifferencesOfQuantisedAreThoseOfFloatsQuantised) {
  Random random(99);
  for (int trial = 0; trial < 24; ++trial) {
    const int32_t orders = 1 + trial % 4, valid = static_cast<int32_t>(uniform(random, 0, orders));
    const int64_t rows = uniform(random, 1, 20), width = uniform(random, 1, 600);
    const std::vector<int64_t> shape = {2, rows, width},
                               scales_shape = {2, rows, ceil_div(width, kScaleColumns)};
    const Array feature = Array::random(DType::kFloat32, shape, random, 1, 8), one = [] {
      Array ones(DType::kFloat32, {1});
      ones.set(1, 0);
      return ones;
    }();
    std::vector<Array> values, scales, floats;
    TaylorUpdateArguments plain;
    plain.feature = feature, plain.orders = orders, plain.valid = valid,
    plain.gap = static_cast<float>(uniform(random, 1, 6));
    TaylorUpdateArguments quantised = plain;
    Array expected_last(DType::kFloat32, shape), last(DType::kFloat32, shape, 8);
    last.poison();
    plain.last = expected_last, quantised.last = last;
    for (size_t i = 0; i < static_cast<size_t>(orders); ++i) {
      values.emplace_back(DType::kUInt8, shape, 3), scales.emplace_back(DType::kFloat32, scales_shape, 1);
      floats.emplace_back(DType::kFloat32, shape);
      QuantizeArguments q;
      const Array x = Array::random(DType::kFloat32, shape, random);
      q.x = x, q.values = values[i], q.scales = scales[i];
      quantize_fp8(q, Context{});
      TaylorForecastArguments read;
      read.derivatives[0] = values[i], read.scales[0] = scales[i], read.coefficients = one,
      read.out = floats[i];
      taylor_forecast(read, Context{});
    }
    for (size_t i = 0; i < static_cast<size_t>(orders); ++i) {
      plain.derivatives[i] = floats[i];
      quantised.derivatives[i] = values[i], quantised.scales[i] = scales[i];
    }
    taylor_update(plain, Context{});
    taylor_update(quantised, Context{});
    ASSERT_EQ(last.values(), expected_last.values()) << orders << " orders, valid " << valid;
    for (size_t i = 0; i < static_cast<size_t>(orders); ++i) {
      Array expected(DType::kUInt8, shape, 3), expected_scales(DType::kFloat32, scales_shape, 1);
      QuantizeArguments q;
      q.x = floats[i], q.values = expected, q.scales = expected_scales;
      quantize_fp8(q, Context{});
      ASSERT_EQ(scales[i].values(), expected_scales.values()) << "order " << i << ", valid " << valid;
      ASSERT_EQ(values[i].values(), expected.values()) << "order " << i << ", valid " << valid;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, ElementwiseTest, ::testing::ValuesIn(testing::instruction_sets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace flashomni
