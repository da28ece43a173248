// Argument checks shared by all operators. Each throws "<argument>: expected ..., got ..." and costs nothing
// else.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "flashomni/backend.h"
#include "flashomni/error.h"
#include "flashomni/gemm.h"
#include "flashomni/symbols.h"
#include "flashomni/tensor.h"

namespace flashomni::check {

/// An extent that a shape leaves open.
inline constexpr int64_t kAny = -1;

/// Present, of this type and shape, on this device, last stride 1, with memory.
void tensor(const TensorView& view, const char* name, DType dtype, Device device,
            std::initializer_list<int64_t> shape);
/// The same for a tensor that operators write: no two elements share memory.
void output(const TensorView& view, const char* name, DType dtype, Device device,
            std::initializer_list<int64_t> shape);
void output(const TensorView& view, const char* name);

/// Present, and float16, bfloat16 or (on the CPU) float32.
void float_tensor(const TensorView& view, const char* name);

/// Throws if an element of both views may lie in the same memory. Views that interleave (columns of one
/// buffer) pass.
void disjoint(const TensorView& a, const char* a_name, const TensorView& b, const char* b_name);

void at_least(int64_t value, int64_t least, const char* name);
/// One that every kernel knows: 64, 72, 80, 96, 128 or 256.
void head_dim(int64_t value, const char* tensor_name);
void fraction(float value, const char* name);
void finite(float value, const char* name);
/// Of what is added below a root.
void eps(float value);
void block_size(int64_t value, const char* name);
/// 128 x 128, 128 x 64 or 64 x 64.
void block_pair(int64_t block_q, int64_t block_kv);
/// first + rows <= tokens, first >= 0.
void rows_within(int64_t first, int64_t rows, int64_t tokens, const char* rows_name);
void threads(const Context& context);
void counter(const Context& context);
void workspace(const Context& context, size_t needed);

/// int32 [batch + 1] (batch may be kAny); on the CPU also ascending and within 0 .. limit, the extent of
/// `limited`.
void indptr(const TensorView& view, const char* name, int64_t batch, Device device, int64_t limit,
            const char* limited);

/// `bits` (may be absent) as uint8 [batch, bytes] or, with indptr, [total]; every element exactly as long as
/// needed(b) says. Elements of a batch without indptr share one length, that of the longest.
void bits_shape(const TensorView& view, const TensorView& indptr, int64_t batch, Device device,
                const char* name);
[[noreturn]] void bits_length(const char* name, int64_t element, int64_t needed, int64_t got);

template <class Needed>
void bits(const TensorView& view, const TensorView& indptr, int64_t batch, Device device, const char* name,
          Needed&& needed) {
  bits_shape(view, indptr, batch, device, name);
  if (!view.present()) return;
  if (!indptr.present()) {
    int64_t longest = 0, element = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t bytes = needed(b);
      if (bytes > longest) longest = bytes, element = b;
    }
    if (batch > 0 && view.size(1) != longest) bits_length(name, element, longest, view.size(1));
  } else if (device.type == DeviceType::kCPU) {
    const int32_t* ends = indptr.as<const int32_t>();
    for (int64_t b = 0; b < batch; ++b) {
      if (ends[b + 1] - ends[b] != needed(b)) bits_length(name, b, needed(b), ends[b + 1] - ends[b]);
    }
  }
}

/// What the linear layers share: the tiles' bits and the rows' place in the joint sequence.
void tiles(const TileSymbols& tiles, int64_t batch, int64_t rows, Device device, const char* rows_name);

}  // namespace flashomni::check
