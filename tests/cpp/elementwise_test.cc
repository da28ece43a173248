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
