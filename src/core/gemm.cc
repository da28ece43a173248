#include "flashomni/gemm.h"

#include "src/core/check.h"

namespace flashomni {
namespace {

constexpr const char* kO[] = {"o[0]", "o[1]", "o[2]", "o[3]"};
constexpr const char* kCached[] = {"cached[0]", "cached[1]", "cached[2]", "cached[3]"};
static_assert(std::size(kO) == kMaxOrder + 1 && std::size(kCached) == kMaxOrder + 1);

/// x [B, M, K], past [B, M, K'] or absent (K' = 0), weight [N, K + K'], bias [N] or absent, out [B, M, N],
/// all of x's type.
void check_linear(const TensorView& x, const char* x_name, const TensorView& past, const TensorView& weight,
                  const TensorView& bias, const TensorView& out) {
  check::float_tensor(x, x_name);
  const DType dtype = x.dtype;
  const Device device = x.device;
  check::tensor(x, x_name, dtype, device, {check::kAny, check::kAny, check::kAny});
  if (past.present()) check::tensor(past, "past", dtype, device, {x.size(0), x.size(1), check::kAny});
  const int64_t columns = x.size(2) + (past.present() ? past.size(2) : 0);
  check::tensor(weight, "weight", dtype, device, {check::kAny, columns});
  check::at_least(weight.size(0), 1, "rows of weight");
  check::at_least(weight.size(1), 1, "columns of weight");
  if (bias.present()) check::tensor(bias, "bias", dtype, device, {weight.size(0)});
  check::output(out, "out", dtype, device, {x.size(0), x.size(1), weight.size(0)});
  check::disjoint(out, "out", x, x_name);
  check::disjoint(out, "out", past, "past");
  check::disjoint(out, "out", weight, "weight");
  check::disjoint(out, "out", bias, "bias");
}

void check_tiles(const TileSymbols& tiles, const TensorView& x, const char* x_name, const TensorView& out,
                 const char* out_name) {
  check::tiles(tiles, x.size(0), x.size(1), x.device, x_name);
  check::disjoint(out, out_name, tiles.cache, "symbols.cache");
  check::disjoint(out, out_name, tiles.cache_indptr, "symbols.cache_indptr");
}

void check_orders(int32_t orders) {
  if (orders < 1 || orders > kMaxOrder + 1) {
    fail(ErrorKind::kValue, "orders", text("1 to ", kMaxOrder + 1), text(orders));
  }
}

void check_heads_fit(const TileSymbols& tiles, int64_t head_dim, const TensorView& o, const char* name,
                     const TensorView& past) {
  check::at_least(tiles.heads, 1, "heads");
  // Kernels read k in vectors and in pairs: heads start on a whole one.
  if (head_dim < 8 || head_dim % 8 != 0) {
    fail(ErrorKind::kValue, "head_dim", "a positive multiple of 8", text(head_dim));
  }
  const int64_t columns = o.size(2);
  if (columns / head_dim < tiles.heads) {
    fail(ErrorKind::kValue, name,
         text("at least heads * head_dim = ", tiles.heads, " * ", head_dim, " columns"), text(columns));
  }
  if (past.present() && columns != tiles.heads * head_dim) {
    fail(ErrorKind::kValue, name,
         text("heads * head_dim = ", tiles.heads, " * ", head_dim, " columns, as the others are in past"),
         text(columns));
  }
}

const Backend& check_all(const GemmQArguments& a, const Context& context) {
  check_linear(a.x, "x", TensorView{}, a.weight, a.bias, a.out);
  check_tiles(a.tiles, a.x, "x", a.out, "out");
  if (a.weight.size(0) % a.tiles.heads != 0) {
    fail(ErrorKind::kValue, "weight", text("a number of rows divisible by heads = ", a.tiles.heads),
         text(a.weight.size(0)));
  }
  const int activation = static_cast<int>(a.activation);
  if (activation < 0 || activation > static_cast<int>(Activation::kGelu)) {
    fail(ErrorKind::kValue, "activation", "none, gelu_tanh or gelu", text(activation));
  }
  check::threads(context);
  check::counter(context);
  return backend_for(a.x.device);
}

const Backend& check_all(const GemmOUpdateArguments& a, const Context& context) {
  check_orders(a.orders);
  const TensorView& o = a.o[0];
  check_linear(o, kO[0], a.past, a.weight, a.bias, a.out);
  check_heads_fit(a.tiles, a.head_dim, o, kO[0], a.past);
  check_tiles(a.tiles, o, kO[0], a.out, "out");
  for (int i = 1; i < a.orders; ++i) {
    check::tensor(a.o[i], kO[i], o.dtype, o.device, {o.size(0), o.size(1), check::kAny});
    check_heads_fit(a.tiles, a.head_dim, a.o[i], kO[i], TensorView{});
    check::disjoint(a.out, "out", a.o[i], kO[i]);
  }
  for (int i = 0; i < a.orders; ++i) {
    const TensorView& cached = a.cached[i];
    check::output(cached, kCached[i], o.dtype, o.device, {o.size(0), o.size(1), a.weight.size(0)});
    check_tiles(a.tiles, o, kO[0], cached, kCached[i]);
    check::disjoint(cached, kCached[i], a.out, "out");
    check::disjoint(cached, kCached[i], a.past, "past");
    check::disjoint(cached, kCached[i], a.weight, "weight");
    check::disjoint(cached, kCached[i], a.bias, "bias");
    for (int j = 0; j < a.orders; ++j) check::disjoint(cached, kCached[i], a.o[j], kO[j]);
    for (int j = 0; j < i; ++j) check::disjoint(cached, kCached[i], a.cached[j], kCached[j]);
  }
  check::threads(context);
  check::counter(context);
  return backend_for(o.device);
}

const Backend& check_all(const GemmODispatchArguments& a, const Context& context) {
  check_orders(a.orders);
  check_linear(a.o, "o", a.past, a.weight, TensorView{}, a.out);
  check_heads_fit(a.tiles, a.head_dim, a.o, "o", a.past);
  check_tiles(a.tiles, a.o, "o", a.out, "out");
  check::tensor(a.coefficients, "coefficients", DType::kFloat32, a.o.device, {a.orders});
  check::disjoint(a.out, "out", a.coefficients, "coefficients");
  for (int i = 0; i < a.orders; ++i) {
    check::tensor(a.cached[i], kCached[i], a.o.dtype, a.o.device,
                  {a.o.size(0), a.o.size(1), a.weight.size(0)});
    check::disjoint(a.out, "out", a.cached[i], kCached[i]);
  }
  check::threads(context);
  check::counter(context);
  return backend_for(a.o.device);
}

}  // namespace

size_t gemm_q_workspace(const GemmQArguments& arguments, const Context& context) {
  return check_all(arguments, context).gemm_q_workspace(arguments, context);
}

void gemm_q(const GemmQArguments& arguments, const Context& context) {
  const Backend& backend = check_all(arguments, context);
  check::workspace(context, backend.gemm_q_workspace(arguments, context));
  if (arguments.out.numel() > 0) backend.gemm_q(arguments, context);
}

size_t gemm_o_update_workspace(const GemmOUpdateArguments& arguments, const Context& context) {
  return check_all(arguments, context).gemm_o_update_workspace(arguments, context);
}

void gemm_o_update(const GemmOUpdateArguments& arguments, const Context& context) {
  const Backend& backend = check_all(arguments, context);
  check::workspace(context, backend.gemm_o_update_workspace(arguments, context));
  if (arguments.out.numel() > 0) backend.gemm_o_update(arguments, context);
}

size_t gemm_o_dispatch_workspace(const GemmODispatchArguments& arguments, const Context& context) {
  return check_all(arguments, context).gemm_o_dispatch_workspace(arguments, context);
}

void gemm_o_dispatch(const GemmODispatchArguments& arguments, const Context& context) {
  const Backend& backend = check_all(arguments, context);
  check::workspace(context, backend.gemm_o_dispatch_workspace(arguments, context));
  if (arguments.out.numel() > 0) backend.gemm_o_dispatch(arguments, context);
}

}  // namespace flashomni
