// What the tests share: arrays of any type with their exact values in double, random symbols, expectations of
// errors.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "flashomni/backend.h"
#include "flashomni/error.h"
#include "flashomni/symbols.h"
#include "flashomni/tensor.h"

namespace flashomni::testing {

using Random = std::mt19937_64;

inline int64_t uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

/// Half a unit in the last place, relative: what one rounding to the type may cost.
inline double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return std::ldexp(1, -11);
    case DType::kBFloat16:
      return std::ldexp(1, -8);
    default:
      return std::ldexp(1, -24);
  }
}

/// The bits of `value` in a float type, to nearest even. Tests stay far from overflow.
inline uint32_t encode(DType dtype, double value) {
  const float single = static_cast<float>(value);
  const uint32_t bits = std::bit_cast<uint32_t>(single);
  if (dtype == DType::kFloat32) return bits;
  if (dtype == DType::kBFloat16) {
    if (std::isnan(single)) return 0x7FC0;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  }
  const uint32_t sign = (bits >> 16) & 0x8000;
  if (std::isnan(single)) return sign | 0x7E00;
  if (std::isinf(single)) return sign | 0x7C00;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  int exponent = std::max(std::ilogb(magnitude), -14);
  double mantissa = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  if (mantissa >= 2048) mantissa /= 2, ++exponent;
  const uint32_t fraction = static_cast<uint32_t>(mantissa);
  return sign | (fraction < 1024 ? fraction : (static_cast<uint32_t>(exponent + 15) << 10) + fraction - 1024);
}

inline double decode(DType dtype, uint32_t bits) {
  if (dtype == DType::kFloat32) return std::bit_cast<float>(bits);
  if (dtype == DType::kBFloat16) return std::bit_cast<float>(bits << 16);
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = (bits >> 10) & 31;
  const double fraction = bits & 1023;
  if (exponent == 31) return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

/// A dense tensor that owns its memory. Rows of the last dimension may be padded, so that strides are not
/// compact.
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::vector<int64_t> shape, int64_t padding = 0) : shape_(std::move(shape)) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int32_t>(shape_.size());
    int64_t stride = 1;
    for (int i = view_.ndim - 1; i >= 0; --i) {
      view_.shape[i] = shape_[i];
      view_.strides[i] = stride;
      stride *= shape_[i];
      if (i == view_.ndim - 1) stride += padding;
    }
    bytes_.resize(static_cast<size_t>(stride * bytes_of(dtype)));
  }
  static Array random(DType dtype, std::vector<int64_t> shape, Random& random, double scale = 1,
                      int64_t padding = 0) {
    Array result(dtype, std::move(shape), padding);
    std::normal_distribution<double> normal(0, scale);
    result.fill([&] { return normal(random); });
    return result;
  }
  static Array ints(const std::vector<int32_t>& values) {
    Array result(DType::kInt32, {static_cast<int64_t>(values.size())});
    if (!values.empty()) std::memcpy(result.bytes_.data(), values.data(), values.size() * 4);
    return result;
  }

  TensorView view() const {
    TensorView result = view_;
    // An empty tensor has a place too, as torch's have.
    result.data =
        const_cast<uint8_t*>(bytes_.empty() ? reinterpret_cast<const uint8_t*>(this) : bytes_.data());
    return result;
  }
  operator TensorView() const { return view(); }

  template <class Next>
  void fill(Next&& next) {
    each([&](int64_t at) { put(at, next()); });
  }
  void poison() {
    fill([] { return std::nan(""); });
  }

  template <class... Index>
  double operator()(Index... index) const {
    return get(offset({static_cast<int64_t>(index)...}));
  }
  template <class... Index>
  void set(double value, Index... index) {
    put(offset({static_cast<int64_t>(index)...}), value);
  }
  /// All elements in order.
  std::vector<double> values() const {
    std::vector<double> result;
    each([&](int64_t at) { result.push_back(get(at)); });
    return result;
  }
  uint8_t* bytes() { return bytes_.data(); }
  const std::vector<uint8_t>& storage() const { return bytes_; }
  int64_t size(int dim) const { return shape_[dim]; }
  DType dtype() const { return view_.dtype; }

 private:
  int64_t offset(std::initializer_list<int64_t> index) const {
    int64_t at = 0;
    int dim = 0;
    for (const int64_t i : index) at += i * view_.strides[dim++];
    return at;
  }
  double get(int64_t at) const {
    if (view_.dtype == DType::kUInt8) return bytes_[at];
    uint32_t bits = 0;
    const size_t item = static_cast<size_t>(bytes_of(view_.dtype));
    std::memcpy(&bits, bytes_.data() + at * item, item);
    return view_.dtype == DType::kInt32 ? std::bit_cast<int32_t>(bits) : decode(view_.dtype, bits);
  }
  void put(int64_t at, double value) {
    if (view_.dtype == DType::kUInt8) {
      bytes_[at] = static_cast<uint8_t>(value);
      return;
    }
    const uint32_t bits = view_.dtype == DType::kInt32 ? std::bit_cast<uint32_t>(static_cast<int32_t>(value))
                                                       : encode(view_.dtype, value);
    const size_t item = static_cast<size_t>(bytes_of(view_.dtype));
    std::memcpy(bytes_.data() + at * item, &bits, item);
  }
  template <class Visit>
  void each(Visit&& visit) const {
    if (view_.numel() == 0) return;
    std::array<int64_t, kMaxDims> index{};
    for (;;) {
      int64_t at = 0;
      for (int i = 0; i < view_.ndim; ++i) at += index[i] * view_.strides[i];
      visit(at);
      int dim = view_.ndim - 1;
      while (dim >= 0 && ++index[dim] == view_.shape[dim]) index[dim--] = 0;
      if (dim < 0) return;
    }
  }

  std::vector<int64_t> shape_;
  std::vector<uint8_t> bytes_;
  TensorView view_;
};

/// Dense masks of a batch, and their packed form. Bits of cached rows in `skip` are as drawn, not cleared.
struct Masks {
  SymbolGeometry geometry;
  int64_t batch = 1;
  Array cache_bits, skip_bits;

  static Masks random(const SymbolGeometry& geometry, int64_t batch, double cache_density,
                      double skip_density, Random& random) {
    Masks m;
    m.geometry = geometry;
    m.batch = batch;
    m.cache_bits = Array(DType::kUInt8, {batch, geometry.cache_bytes()});
    m.skip_bits = Array(DType::kUInt8, {batch, geometry.skip_bytes()});
    std::bernoulli_distribution active(cache_density), selected(skip_density);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < geometry.cache_bits(); ++i) write_bit(m.cache_row(b), i, active(random));
      for (int64_t i = 0; i < geometry.skip_bits(); ++i) write_bit(m.skip_row(b), i, selected(random));
    }
    return m;
  }
  uint8_t* cache_row(int64_t b) { return cache_bits.bytes() + b * geometry.cache_bytes(); }
  uint8_t* skip_row(int64_t b) { return skip_bits.bytes() + b * geometry.skip_bytes(); }
  bool active(int64_t b, int64_t h, int64_t i) const {
    return bit(cache_bits, b * geometry.cache_bytes() * 8 + i * geometry.heads + h);
  }
  bool selected(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return bit(skip_bits,
               b * geometry.skip_bytes() * 8 + (i * geometry.heads + h) * geometry.kv_blocks() + j);
  }
  Symbols symbols() const {
    Symbols s;
    s.cache = cache_bits;
    s.skip = skip_bits;
    s.block_q = geometry.block_q;
    s.block_kv = geometry.block_kv;
    return s;
  }

 private:
  static bool bit(const Array& bits, int64_t i) { return (bits.storage()[i / 8] >> (i % 8)) & 1; }
};

/// Sets an environment variable for one scope.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const std::string& value) : name_(name) {
    const char* old = std::getenv(name);
    had_ = old != nullptr;
    if (had_) old_ = old;
    setenv(name, value.c_str(), 1);
  }
  ~ScopedVariable() { had_ ? setenv(name_, old_.c_str(), 1) : unsetenv(name_); }
  ScopedVariable(const ScopedVariable&) = delete;
  ScopedVariable& operator=(const ScopedVariable&) = delete;

 private:
  const char* name_;
  bool had_ = false;
  std::string old_;
};

/// The instruction sets that this chip has, best first.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512bf16", "avx512", "avx2", "generic"}) {
    ScopedVariable force("FLASHOMNI_CPU_ISA", name);
    try {
      cpu_isa();
      names.push_back(name);
    } catch (const Error&) {
      // not on this chip
    }
  }
  return names;
}

/// Memory for a workspace: 64-byte aligned, exactly as long as asked, full of NaN.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : bytes_(bytes) {
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
    std::memset(memory_, 0xFF, bytes + 1);
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  Context context(int threads) const {
    Context c;
    c.workspace = memory_;
    c.workspace_bytes = bytes_;
    c.threads = threads;
    return c;
  }
  bool intact() const { return memory_[bytes_] == 0xFF; }

 private:
  size_t bytes_;
  uint8_t* memory_;
};

/// Runs an operator with a workspace of exactly the size that it asks for.
template <class Arguments>
void run_operator(size_t (*bytes)(const Arguments&, const Context&),
                  void (*op)(const Arguments&, const Context&), const Arguments& arguments, int threads = 2) {
  Context context;
  context.threads = threads;
  const Workspace workspace(bytes(arguments, context));
  op(arguments, workspace.context(threads));
  EXPECT_TRUE(workspace.intact()) << "wrote past its workspace";
}

}  // namespace flashomni::testing

/// The statement throws Error of this kind, and its message starts with "<argument>: expected".
#define EXPECT_FAILS(statement, error_kind, argument)                                        \
  try {                                                                                      \
    statement;                                                                               \
    ADD_FAILURE() << "no error, expected one that names " << (argument);                     \
  } catch (const ::flashomni::Error& error) {                                                \
    EXPECT_EQ(error.kind(), ::flashomni::ErrorKind::error_kind) << error.what();             \
    EXPECT_EQ(std::string(error.what()).rfind(std::string(argument) + ": expected ", 0), 0u) \
        << error.what();                                                                     \
    EXPECT_NE(std::string(error.what()).find(", got "), std::string::npos) << error.what();  \
  }
