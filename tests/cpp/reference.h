// The float64 reference: plain loops over the definitions in the public headers, none of the library's own
// code. Each function gives the exact result and, where rounding scales with the terms, their magnitude.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "flashomni/attention.h"
#include "flashomni/gemm.h"
#include "tests/cpp/support.h"

namespace flashomni::testing {

/// One query row of one head over the keys that `weight_of` admits.
struct RowResult {
  std::vector<double> out, magnitude;  // sum of p v, and of p |v|
  double lse2 = -std::numeric_limits<double>::infinity();
};

/// A key with its value, as the softmax sees it: score(key) + log(count).
struct Column {
  const double *key, *value;
  double count = 1;
};

inline RowResult attention_row(const double* query, const std::vector<Column>& columns, int64_t dim,
                               double scale) {
  RowResult result;
  result.out.assign(static_cast<size_t>(dim), 0.0);
  result.magnitude = result.out;
  if (columns.empty()) return result;
  std::vector<double> scores;
  for (const Column& column : columns) {
    double dot = 0;
    for (int64_t d = 0; d < dim; ++d) dot += query[d] * column.key[d];
    scores.push_back(dot * scale + std::log(column.count));
  }
  const double peak = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const double score : scores) sum += std::exp(score - peak);
  for (size_t c = 0; c < columns.size(); ++c) {
    const double p = std::exp(scores[c] - peak) / sum;
    for (int64_t d = 0; d < dim; ++d) {
      result.out[d] += p * columns[c].value[d];
      result.magnitude[d] += p * std::fabs(columns[c].value[d]);
    }
  }
  result.lse2 = (peak + std::log(sum)) / std::log(2.0);
  return result;
}

/// A sum of products with the sum of their magnitudes.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

inline double gelu(double x) {
  return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
}
inline double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

/// What a result in `dtype` may differ from the exact one: its own rounding, and float32 sums of `terms`
/// products. A probability or a rotated input may be rounded to the type once more on the way (`inner`
/// roundings of each term).
inline double tolerance(DType dtype, double value, double magnitude, int64_t terms, int inner = 0) {
  const double single = rounding(DType::kFloat32);
  return 1.01 * rounding(dtype) * std::fabs(value) +
         magnitude * (inner * rounding(dtype) + single * (4 + static_cast<double>(terms))) + 1e-7;
}

}  // namespace flashomni::testing
