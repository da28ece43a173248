#include "src/core/check.h"

#include <cmath>
#include <string>

namespace flashomni::check {
namespace {

std::string shape_text(std::initializer_list<int64_t> shape) {
  std::string result;
  for (const int64_t extent : shape) {
    result += text(result.empty() ? "[" : ", ", extent == kAny ? std::string("*") : text(extent));
  }
  return result + "]";
}

void present(const TensorView& view, const char* name) {
  if (!view.present()) fail(ErrorKind::kType, name, "a tensor", "nothing");
}

/// Addresses, in bytes, of the first and one past the last element; negative strides included.
struct Extent {
  intptr_t first, end;
};

Extent extent_of(const TensorView& view) {
  const int64_t item = bytes_of(view.dtype);
  intptr_t first = reinterpret_cast<intptr_t>(view.data), end = first + item;
  for (int i = 0; i < view.ndim; ++i) {
    const int64_t reach = (view.shape[i] - 1) * view.strides[i] * item;
    (reach < 0 ? first : end) += reach;
  }
  return {first, end};
}

/// Bytes spanned by one period of `view` if its elements repeat every `period` bytes: the dimensions that are
/// no multiple of the period. 0 if they do not fit in one.
int64_t span_in_period(const TensorView& view, int64_t period) {
  int64_t span = bytes_of(view.dtype);
  for (int i = 0; i < view.ndim; ++i) {
    const int64_t stride = view.strides[i] * bytes_of(view.dtype);
    if (view.shape[i] < 2 || stride % period == 0) continue;
    if (stride < 0) return 0;
    span += (view.shape[i] - 1) * stride;
  }
  return span <= period ? span : 0;
}

/// True if both views lie in periods of `period` bytes without meeting in any.
bool interleave(const TensorView& a, const TensorView& b, int64_t period) {
  const int64_t a_span = span_in_period(a, period), b_span = span_in_period(b, period);
  if (a_span == 0 || b_span == 0) return false;
  const int64_t apart = reinterpret_cast<intptr_t>(b.data) - reinterpret_cast<intptr_t>(a.data);
  const int64_t offset = ((apart % period) + period) % period;
  return offset >= a_span && offset + b_span <= period;
}

}  // namespace

void tensor(const TensorView& view, const char* name, DType dtype, Device device,
            std::initializer_list<int64_t> shape) {
  present(view, name);
  if (view.dtype != dtype) {
    fail(ErrorKind::kType, name, text(name_of(dtype), shape_text(shape)), describe(view));
  }
  bool fits = view.ndim == static_cast<int32_t>(shape.size());
  for (int i = 0; fits && i < view.ndim; ++i)
    fits = shape.begin()[i] == kAny || shape.begin()[i] == view.shape[i];
  if (!fits) fail(ErrorKind::kValue, name, text(name_of(dtype), shape_text(shape)), describe(view));
  if (!(view.device == device)) {
    fail(ErrorKind::kValue, name, text("a tensor on ", name_of(device)),
         text("one on ", name_of(view.device)));
  }
  const int last = view.ndim - 1;
  if (last >= 0 && view.shape[last] > 1 && view.strides[last] != 1) {
    fail(ErrorKind::kValue, name, "a last stride of 1", text(view.strides[last]));
  }
  if (view.data == nullptr && view.numel() > 0) {
    fail(ErrorKind::kValue, name, "memory", text("a null pointer for ", describe(view)));
  }
}

void output(const TensorView& view, const char* name) {
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] > 1 && view.strides[i] == 0) {
      fail(ErrorKind::kValue, name, "a tensor to write, each element in its own memory",
           text("stride 0 in dimension ", i));
    }
  }
}

void output(const TensorView& view, const char* name, DType dtype, Device device,
            std::initializer_list<int64_t> shape) {
  tensor(view, name, dtype, device, shape);
  output(view, name);
}

void float_tensor(const TensorView& view, const char* name) {
  present(view, name);
  if (view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16) return;
  if (view.dtype == DType::kFloat32 && view.device.type == DeviceType::kCPU) return;
  fail(ErrorKind::kType, name,
       view.device.type == DeviceType::kCPU ? "float32, float16 or bfloat16" : "float16 or bfloat16",
       describe(view));
}

void disjoint(const TensorView& a, const char* a_name, const TensorView& b, const char* b_name) {
  if (!a.present() || !b.present() || a.numel() == 0 || b.numel() == 0) return;
  const Extent x = extent_of(a), y = extent_of(b);
  if (x.end <= y.first || y.end <= x.first) return;
  // Rows or columns of one buffer meet in their extents only: look at the buffer period by period.
  for (const TensorView* view : {&a, &b}) {
    for (int i = 0; i < view->ndim; ++i) {
      const int64_t period = view->strides[i] * bytes_of(view->dtype);
      if (view->shape[i] > 1 && period > 0 && interleave(a, b, period)) return;
    }
  }
  fail(ErrorKind::kValue, a_name, text("memory apart from ", b_name, "'s"), "overlapping tensors");
}

void at_least(int64_t value, int64_t least, const char* name) {
  if (value < least) fail(ErrorKind::kValue, name, text("at least ", least), text(value));
}

void head_dim(int64_t value, const char* tensor_name) {
  constexpr int64_t kAllowed[] = {64, 72, 80, 96, 128, 256};
  if (std::find(std::begin(kAllowed), std::end(kAllowed), value) == std::end(kAllowed)) {
    fail(ErrorKind::kValue, tensor_name, "a head dimension of 64, 72, 80, 96, 128 or 256", text(value));
  }
}

void fraction(float value, const char* name) {
  if (!(value >= 0.0f && value <= 1.0f)) fail(ErrorKind::kValue, name, "a number from 0 to 1", text(value));
}

void eps(float value) {
  if (!(value >= 0.0f) || !std::isfinite(value))
    fail(ErrorKind::kValue, "eps", "a finite number of at least 0", text(value));
}

void finite(float value, const char* name) {
  if (!std::isfinite(value)) fail(ErrorKind::kValue, name, "a finite number", text(value));
}

void block_size(int64_t value, const char* name) {
  if (value != 64 && value != 128) fail(ErrorKind::kValue, name, "64 or 128", text(value));
}

void block_pair(int64_t block_q, int64_t block_kv) {
  block_size(block_q, "block_q");
  block_size(block_kv, "block_kv");
  if (block_kv > block_q)
    fail(ErrorKind::kValue, "block_kv", text("at most block_q = ", block_q), text(block_kv));
}

void rows_within(int64_t first, int64_t rows, int64_t tokens, const char* rows_name) {
  at_least(first, 0, "row_offset");
  if (first + rows > tokens) {
    fail(ErrorKind::kValue, "row_offset", text("row_offset + rows of ", rows_name, " <= tokens = ", tokens),
         text(first, " + ", rows));
  }
}

void threads(const Context& context) {
  at_least(context.threads, 0, "threads");
}

void workspace(const Context& context, size_t needed) {
  if (needed == 0) return;
  if (context.workspace == nullptr || context.workspace_bytes < needed) {
    throw WorkspaceError(needed, text("workspace: expected at least ", needed, " bytes, got ",
                                      context.workspace == nullptr ? 0 : context.workspace_bytes));
  }
  if (reinterpret_cast<uintptr_t>(context.workspace) % 64 != 0) {
    fail(ErrorKind::kRuntime, "workspace", "memory aligned to 64 bytes", text(context.workspace));
  }
}

void counter(const Context& context) {
  if (reinterpret_cast<uintptr_t>(context.counter) % alignof(int32_t) != 0) {
    fail(ErrorKind::kRuntime, "counter", "memory aligned to 4 bytes", text(context.counter));
  }
}

void indptr(const TensorView& view, const char* name, int64_t batch, Device device, int64_t limit,
            const char* limited) {
  tensor(view, name, DType::kInt32, device, {batch == kAny ? kAny : batch + 1});
  if (view.size(0) < 1) fail(ErrorKind::kValue, name, "int32[batch + 1]", describe(view));
  if (device.type != DeviceType::kCPU) return;
  const int32_t* ends = view.as<const int32_t>();
  if (ends[0] < 0) fail(ErrorKind::kValue, name, "offsets of at least 0", text(ends[0]));
  for (int64_t b = 1; b < view.size(0); ++b) {
    if (ends[b] < ends[b - 1]) {
      fail(ErrorKind::kValue, name, "ascending offsets", text(ends[b], " after ", ends[b - 1]));
    }
  }
  const int32_t last = ends[view.size(0) - 1];
  if (last > limit) fail(ErrorKind::kValue, name, text("offsets within ", limited, "'s ", limit), text(last));
}

void bits_shape(const TensorView& view, const TensorView& offsets, int64_t batch, Device device,
                const char* name) {
  if (!offsets.present()) {
    if (view.present()) tensor(view, name, DType::kUInt8, device, {batch, kAny});
    return;
  }
  const std::string offsets_name = text(name, "_indptr");
  if (!view.present())
    fail(ErrorKind::kValue, offsets_name, text("nothing without ", name), describe(offsets));
  tensor(view, name, DType::kUInt8, device, {kAny});
  indptr(offsets, offsets_name.c_str(), batch, device, view.size(0), name);
}

void bits_length(const char* name, int64_t element, int64_t needed, int64_t got) {
  fail(ErrorKind::kValue, name, text(needed, " bytes for batch element ", element), text(got));
}

void tiles(const TileSymbols& tiles, int64_t batch, int64_t rows, Device device, const char* rows_name) {
  at_least(tiles.heads, 1, "heads");
  block_size(tiles.block_q, "block_q");
  at_least(tiles.row_offset, 0, "row_offset");
  at_least(tiles.tokens, 0, "tokens");
  // Without bits the length of the joint sequence says nothing, and may be left out.
  if (tiles.cache.present() || tiles.tokens > 0) rows_within(tiles.row_offset, rows, tiles.tokens, rows_name);
  SymbolGeometry geometry;
  geometry.q_tokens = tiles.tokens;
  geometry.heads = tiles.heads;
  geometry.block_q = tiles.block_q;
  bits(tiles.cache, tiles.cache_indptr, batch, device, "symbols.cache",
       [&](int64_t) { return geometry.cache_bytes(); });
}

}  // namespace flashomni::check
