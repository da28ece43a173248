// What tests of argument checks share: faults to put into good arguments, and what each must end in: the
// right kind of error, and a message that names the argument.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "tests/cpp/support.h"

namespace flashomni::testing {

inline constexpr DType kHalf = DType::kBFloat16, kSingle = DType::kFloat32;
inline constexpr auto V = ErrorKind::kValue, T = ErrorKind::kType, N = ErrorKind::kNotImplemented;

/// One way to spoil arguments that were good.
template <class Arguments>
struct Fault {
  const char* argument;
  ErrorKind kind;
  std::function<void(Arguments&)> spoil;
};

template <class Arguments>
void expect_faults(const Arguments& good, const std::vector<Fault<Arguments>>& faults,
                   const std::function<void(const Arguments&)>& run) {
  ASSERT_NO_THROW(run(good));
  for (size_t i = 0; i < faults.size(); ++i) {
    SCOPED_TRACE(text("fault ", i, ": ", faults[i].argument));
    Arguments bad = good;
    faults[i].spoil(bad);
    try {
      run(bad);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), faults[i].kind) << error.what();
      EXPECT_EQ(std::string(error.what()).rfind(std::string(faults[i].argument) + ": expected ", 0), 0u)
          << error.what();
    }
  }
}

/// Faults that every tensor argument shares.
template <class Arguments>
void add_tensor_faults(std::vector<Fault<Arguments>>* faults, const char* name,
                       std::function<TensorView&(Arguments&)> of, bool required, ErrorKind missing = T) {
  const auto add = [&](ErrorKind kind, std::function<void(TensorView&)> spoil) {
    faults->push_back({name, kind, [of, spoil](Arguments& a) { spoil(of(a)); }});
  };
  if (required) add(missing, [](TensorView& v) { v = TensorView{}; });
  add(T, [](TensorView& v) { v.dtype = v.dtype == DType::kInt32 ? DType::kUInt8 : DType::kInt32; });
  add(V, [](TensorView& v) { v.data = nullptr; });
  add(V, [](TensorView& v) { v.strides[v.ndim - 1] = 2; });
  add(V, [](TensorView& v) { v.shape[v.ndim - 1] += 1; });
  add(V, [](TensorView& v) { v.ndim -= 1; });
}

template <class Arguments>
void add_device_fault(std::vector<Fault<Arguments>>* faults, const char* name,
                      std::function<TensorView&(Arguments&)> of) {
  faults->push_back({name, V, [of](Arguments& a) { of(a).device = Device{DeviceType::kCUDA, 0}; }});
}

template <class Arguments>
std::function<void(const Arguments&)> runner(size_t (*bytes)(const Arguments&, const Context&),
                                             void (*op)(const Arguments&, const Context&)) {
  return [=](const Arguments& a) { run_operator(bytes, op, a); };
}

}  // namespace flashomni::testing
