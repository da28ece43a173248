// Runs of eight 16-bit floats: what a thread moves at a time, in one access where addresses allow it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "flashomni/error.h"
#include "flashomni/tensor.h"

namespace flashomni::cuda {

inline constexpr int kRun = 8;

/// Elements as they lie in memory.
template <class Element>
struct alignas(16) HalfRun {
  Element element[kRun];
};

template <class Element>
__device__ inline HalfRun<Element> load_run(const Element* from, bool aligned) {
  HalfRun<Element> run;
  if (aligned) {
    reinterpret_cast<uint4&>(run) = *reinterpret_cast<const uint4*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.element[i] = from[i];
  }
  return run;
}

template <class Element>
__device__ inline void store_run(Element* to, const HalfRun<Element>& run, bool aligned) {
  if (aligned) {
    // As an assignment it would go element by element.
    __stwb(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(run));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) to[i] = run.element[i];
  }
}

template <class Element>
__device__ inline void to_floats(const HalfRun<Element>& run, float (&values)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] = static_cast<float>(run.element[i]);
}

/// Has the compiler unpack `run` anew from here on: it would rather keep the floats, in twice the registers.
template <class Element>
__device__ inline void keep_packed(HalfRun<Element>& run) {
  uint4& words = reinterpret_cast<uint4&>(run);
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

/// Rounds to the nearest, ties to even.
template <class Element>
__device__ inline HalfRun<Element> from_floats(const float (&values)[kRun]) {
  HalfRun<Element> run;
#pragma unroll
  for (int i = 0; i < kRun; ++i) run.element[i] = Element(values[i]);
  return run;
}

/// Whether every run of `view` that begins at a multiple of eight columns can be moved in one access.
inline bool runs_aligned(const TensorView& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  for (int i = 0; i + 1 < view.ndim; ++i)
    if (view.shape[i] > 1 && view.strides[i] % kRun != 0) return false;
  return true;
}

/// Calls f with a null pointer to the element type: __half or __nv_bfloat16.
template <class F>
void with_half_type(DType dtype, const char* argument, F&& f) {
  if (dtype == DType::kFloat16) return f(static_cast<__half*>(nullptr));
  if (dtype == DType::kBFloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
  fail(ErrorKind::kType, argument, "float16 or bfloat16", name_of(dtype));
}

}  // namespace flashomni::cuda
