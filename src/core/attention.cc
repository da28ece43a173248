#include "flashomni/attention.h"

#include <algorithm>

#include "src/core/check.h"

namespace flashomni {
namespace {

/// Token counts of batch element b. Reads the indptrs, which CUDA tensors do not allow.
struct Lengths {
  const AttentionArguments& a;
  bool ragged;
  int64_t batch() const { return ragged ? a.q_indptr.size(0) - 1 : a.q.size(0); }
  int64_t q(int64_t b) const { return ragged ? difference(a.q_indptr, b) : a.q.size(1); }
  int64_t kv(int64_t b) const { return ragged ? difference(a.kv_indptr, b) : a.k.size(1); }
  static int64_t difference(const TensorView& indptr, int64_t b) {
    return indptr.as<const int32_t>()[b + 1] - indptr.as<const int32_t>()[b];
  }
};

Lengths check_tensors(const AttentionArguments& a) {
  check::float_tensor(a.q, "q");
  const DType dtype = a.q.dtype;
  const Device device = a.q.device;
  const bool ragged = a.q_indptr.present() || a.kv_indptr.present();
  if (ragged) {
    check::tensor(a.q, "q", dtype, device, {check::kAny, check::kAny, check::kAny});
    const int64_t dim = a.q.size(2);
    check::head_dim(dim, "q");
    check::tensor(a.k, "k", dtype, device, {check::kAny, check::kAny, dim});
    check::tensor(a.v, "v", dtype, device, {a.k.size(0), a.k.size(1), dim});
    check::output(a.out, "out", dtype, device, {a.q.size(0), a.q.size(1), dim});
    if (a.lse.present()) check::output(a.lse, "lse", DType::kFloat32, device, {a.q.size(0), a.q.size(1)});
    check::indptr(a.q_indptr, "q_indptr", check::kAny, device, a.q.size(0), "q");
    check::indptr(a.kv_indptr, "kv_indptr", a.q_indptr.size(0) - 1, device, a.k.size(0), "k");
  } else {
    check::tensor(a.q, "q", dtype, device, {check::kAny, check::kAny, check::kAny, check::kAny});
    const int64_t batch = a.q.size(0), dim = a.q.size(3);
    check::head_dim(dim, "q");
    check::tensor(a.k, "k", dtype, device, {batch, check::kAny, check::kAny, dim});
    check::tensor(a.v, "v", dtype, device, {batch, a.k.size(1), a.k.size(2), dim});
    check::output(a.out, "out", dtype, device, {batch, a.q.size(1), a.q.size(2), dim});
    if (a.lse.present()) {
      check::output(a.lse, "lse", DType::kFloat32, device, {batch, a.q.size(1), a.q.size(2)});
    }
  }
  const int64_t heads = a.q.size(a.q.ndim - 2), kv_heads = a.k.size(a.k.ndim - 2);
  check::at_least(heads, 1, "heads of q");
  if (kv_heads < 1 || heads % kv_heads != 0) {
    fail(ErrorKind::kValue, "k", text("a number of heads that divides q's ", heads), text(kv_heads));
  }
  return {a, ragged};
}

void check_symbols(const AttentionArguments& a, const Lengths& lengths) {
  check::block_pair(a.symbols.block_q, a.symbols.block_kv);
  const Device device = a.q.device;
  // Lengths of a ragged batch on a GPU stay there; its backend clamps instead.
  const bool known = !lengths.ragged || device.type == DeviceType::kCPU;
  const auto geometry = [&](int64_t b) {
    SymbolGeometry g;
    g.q_tokens = lengths.q(b), g.kv_tokens = lengths.kv(b), g.heads = a.q.size(a.q.ndim - 2);
    g.block_q = a.symbols.block_q, g.block_kv = a.symbols.block_kv;
    return g;
  };
  const int64_t batch = lengths.batch();
  if (known) {
    check::bits(a.symbols.cache, a.symbols.cache_indptr, batch, device, "symbols.cache",
                [&](int64_t b) { return geometry(b).cache_bytes(); });
    check::bits(a.symbols.skip, a.symbols.skip_indptr, batch, device, "symbols.skip",
                [&](int64_t b) { return geometry(b).skip_bytes(); });
  } else {
    check::bits_shape(a.symbols.cache, a.symbols.cache_indptr, batch, device, "symbols.cache");
    check::bits_shape(a.symbols.skip, a.symbols.skip_indptr, batch, device, "symbols.skip");
  }
}

void check_summaries(const AttentionArguments& a, const Lengths& lengths) {
  if (a.k_mean.present() != a.v_mean.present()) {
    fail(ErrorKind::kType, a.k_mean.present() ? "v_mean" : "k_mean", "a tensor, as its partner is given",
         "nothing");
  }
  if (!a.k_mean.present() && !a.kv_block_len.present()) return;
  if (a.k_mean.present() && a.causal) {
    fail(ErrorKind::kNotImplemented, "k_mean", "summaries of skipped blocks without causal",
         "both: a summary holds keys that a row may not see");
  }
  if (lengths.ragged) {
    fail(ErrorKind::kNotImplemented, a.k_mean.present() ? "k_mean" : "kv_block_len",
         "a batch without indptrs", "a ragged one");
  }
  const Device device = a.q.device;
  const int64_t tokens = a.k.size(1), block = a.symbols.block_kv, blocks = ceil_div(tokens, block);
  if (a.k_mean.present()) {
    for (const TensorView* mean : {&a.k_mean, &a.v_mean}) {
      check::tensor(*mean, mean == &a.k_mean ? "k_mean" : "v_mean", DType::kFloat32, device,
                    {a.k.size(0), blocks, a.k.size(2), a.k.size(3)});
    }
  }
  if (!a.kv_block_len.present()) return;
  check::tensor(a.kv_block_len, "kv_block_len", DType::kInt32, device, {blocks});
  if (device.type != DeviceType::kCPU) return;
  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t slots = std::min(block, tokens - j * block);
    const int32_t length = a.kv_block_len.as<const int32_t>()[j];
    if (length < 0 || length > slots) {
      fail(ErrorKind::kValue, text("kv_block_len[", j, "]"), text("0 to ", slots), text(length));
    }
  }
}

void check_memory(const AttentionArguments& a) {
  const struct {
    const TensorView& view;
    const char* name;
  } inputs[] = {{a.q, "q"},
                {a.k, "k"},
                {a.v, "v"},
                {a.symbols.cache, "symbols.cache"},
                {a.symbols.skip, "symbols.skip"},
                {a.symbols.cache_indptr, "symbols.cache_indptr"},
                {a.symbols.skip_indptr, "symbols.skip_indptr"},
                {a.q_indptr, "q_indptr"},
                {a.kv_indptr, "kv_indptr"},
                {a.k_mean, "k_mean"},
                {a.v_mean, "v_mean"},
                {a.kv_block_len, "kv_block_len"}};
  for (const auto& input : inputs) {
    check::disjoint(a.out, "out", input.view, input.name);
    check::disjoint(a.lse, "lse", input.view, input.name);
  }
  check::disjoint(a.lse, "lse", a.out, "out");
}

const Backend& check_all(const AttentionArguments& a, const Context& context) {
  const Lengths lengths = check_tensors(a);
  check_symbols(a, lengths);
  check_summaries(a, lengths);
  check_memory(a);
  check::finite(a.scale, "scale");
  check::threads(context);
  return backend_for(a.q.device);
}

}  // namespace

size_t attention_workspace(const AttentionArguments& arguments, const Context& context) {
  return check_all(arguments, context).attention_workspace(arguments, context);
}

void attention(const AttentionArguments& arguments, const Context& context) {
  const Backend& backend = check_all(arguments, context);
  check::workspace(context, backend.attention_workspace(arguments, context));
  if (arguments.out.numel() > 0) backend.attention(arguments, context);
}

}  // namespace flashomni
