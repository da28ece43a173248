#include "flashomni/select.h"

#include <utility>

#include "src/core/check.h"

namespace flashomni {
namespace {

/// Symbols that are written or read whole have elements of one length.
void refuse_indptr(const Symbols& symbols) {
  for (const TensorView* indptr : {&symbols.cache_indptr, &symbols.skip_indptr}) {
    if (!indptr->present()) continue;
    fail(ErrorKind::kNotImplemented,
         indptr == &symbols.cache_indptr ? "symbols.cache_indptr" : "symbols.skip_indptr",
         "nothing: elements of one length", describe(*indptr));
  }
}

const Backend& check_all(const SelectArguments& a, const Context& context) {
  if (!a.q_mean.present()) fail(ErrorKind::kType, "q_mean", "a tensor", "nothing");
  const Device device = a.q_mean.device;
  check::block_pair(a.symbols.block_q, a.symbols.block_kv);
  check::at_least(a.tokens, 1, "tokens");
  SymbolGeometry geometry;
  geometry.q_tokens = geometry.kv_tokens = a.tokens;
  geometry.block_q = a.symbols.block_q, geometry.block_kv = a.symbols.block_kv;
  check::tensor(a.q_mean, "q_mean", DType::kFloat32, device,
                {check::kAny, geometry.q_blocks(), check::kAny, check::kAny});
  const int64_t batch = a.q_mean.size(0), heads = a.q_mean.size(2), dim = a.q_mean.size(3);
  check::at_least(heads, 1, "heads of q_mean");
  check::head_dim(dim, "q_mean");
  geometry.heads = heads;
  check::tensor(a.k_mean, "k_mean", DType::kFloat32, device, {batch, geometry.kv_blocks(), check::kAny, dim});
  const int64_t kv_heads = a.k_mean.size(2);
  if (kv_heads < 1 || heads % kv_heads != 0) {
    fail(ErrorKind::kValue, "k_mean", text("a number of heads that divides q_mean's ", heads),
         text(kv_heads));
  }
  check::output(a.symbols.cache, "symbols.cache", DType::kUInt8, device, {batch, geometry.cache_bytes()});
  check::output(a.symbols.skip, "symbols.skip", DType::kUInt8, device, {batch, geometry.skip_bytes()});
  refuse_indptr(a.symbols);
  check::disjoint(a.symbols.cache, "symbols.cache", a.symbols.skip, "symbols.skip");
  for (const TensorView* written : {&a.symbols.cache, &a.symbols.skip}) {
    const char* name = written == &a.symbols.cache ? "symbols.cache" : "symbols.skip";
    check::disjoint(*written, name, a.q_mean, "q_mean");
    check::disjoint(*written, name, a.k_mean, "k_mean");
  }
  check::at_least(a.text_start, 0, "text_start");
  check::at_least(a.text_length, 0, "text_length");
  if (a.text_start + a.text_length > a.tokens) {
    fail(ErrorKind::kValue, "text_length", text("text_start + text_length <= tokens = ", a.tokens),
         text(a.text_start, " + ", a.text_length));
  }
  check::fraction(a.tau_q, "tau_q");
  check::fraction(a.tau_kv, "tau_kv");
  check::fraction(a.s_q, "s_q");
  check::finite(a.scale, "scale");
  if (a.ramp.present()) {
    check::tensor(a.ramp, "ramp", DType::kFloat32, device, {1});
    check::disjoint(a.symbols.cache, "symbols.cache", a.ramp, "ramp");
    check::disjoint(a.symbols.skip, "symbols.skip", a.ramp, "ramp");
  }
  if (a.k_similarity.present()) {
    check::tensor(a.k_similarity, "k_similarity", DType::kFloat32, device,
                  {batch, geometry.kv_blocks(), kv_heads});
    check::disjoint(a.symbols.cache, "symbols.cache", a.k_similarity, "k_similarity");
    check::disjoint(a.symbols.skip, "symbols.skip", a.k_similarity, "k_similarity");
  }
  check::fraction(a.self_similarity, "self_similarity");
  check::threads(context);
  return backend_for(device);
}

void check_summary(const SummarizeArguments& a) {
  const Symbols& s = a.symbols;
  check::block_pair(s.block_q, s.block_kv);
  check::at_least(a.heads, 1, "heads");
  check::at_least(a.q_tokens, 1, "q_tokens");
  check::at_least(a.kv_tokens, 1, "kv_tokens");
  const SymbolGeometry geometry{a.q_tokens, a.kv_tokens, a.heads, s.block_q, s.block_kv};
  const Device device = s.cache.device;
  check::tensor(s.cache, "symbols.cache", DType::kUInt8, device, {check::kAny, geometry.cache_bytes()});
  const int64_t batch = s.cache.size(0);
  check::at_least(batch, 1, "batch of symbols.cache");
  check::tensor(s.skip, "symbols.skip", DType::kUInt8, device, {batch, geometry.skip_bytes()});
  refuse_indptr(s);
  check::output(a.rows, "rows", DType::kUInt8, device, {batch, ceil_div(geometry.q_blocks(), 8)});
  check::output(a.shares, "shares", DType::kFloat32, device, {2, a.heads});
  check::output(a.awake, "awake", DType::kUInt8, device, {batch});
  const std::pair<const TensorView&, const char*> tensors[] = {{a.rows, "rows"},
                                                               {a.shares, "shares"},
                                                               {a.awake, "awake"},
                                                               {s.cache, "symbols.cache"},
                                                               {s.skip, "symbols.skip"}};
  for (int written = 0; written < 3; ++written) {
    for (int other = written + 1; other < 5; ++other) {
      check::disjoint(tensors[written].first, tensors[written].second, tensors[other].first,
                      tensors[other].second);
    }
  }
}

/// What is measured of the blocks of x.
void check_measures(const TensorView& x, int32_t block, const TensorView& mean, const char* mean_name,
                    const TensorView& similarity) {
  check::block_size(block, "block");
  const int64_t blocks = ceil_div(x.size(1), block);
  check::output(mean, mean_name, DType::kFloat32, x.device, {x.size(0), blocks, x.size(2), x.size(3)});
  check::disjoint(mean, mean_name, x, "x");
  if (!similarity.present()) return;
  check::output(similarity, "similarity", DType::kFloat32, x.device, {x.size(0), blocks, x.size(2)});
  check::disjoint(similarity, "similarity", x, "x");
  check::disjoint(similarity, "similarity", mean, mean_name);
}

/// A norm over each head of x, or over all heads of a token.
void check_norm_weight(const TensorView& weight, const char* name, const TensorView& x) {
  if (!weight.present()) return;
  check::tensor(weight, name, x.dtype, x.device, {check::kAny});
  const int64_t dim = x.size(3), width = x.size(2) * dim;
  if (weight.size(0) != dim && weight.size(0) != width) {
    fail(ErrorKind::kValue, name, text("[", dim, "], for a norm over each head, or [", width, "], over all"),
         describe(weight));
  }
}

void check_norm_rope(const NormRopeArguments& a) {
  check::float_tensor(a.x, "x");
  const Device device = a.x.device;
  check::output(a.x, "x", a.x.dtype, device, {check::kAny, check::kAny, check::kAny, check::kAny});
  const int64_t rows = a.x.size(1), dim = a.x.size(3);
  check::head_dim(dim, "x");
  check_norm_weight(a.weight, "weight", a.x);
  if (a.keys.present()) {
    check::output(a.keys, "keys", a.x.dtype, device, {a.x.size(0), rows, check::kAny, dim});
    check::at_least(a.keys.size(2), 1, "heads of keys");
    check_norm_weight(a.keys_weight, "keys_weight", a.keys);
  } else if (a.keys_weight.present()) {
    fail(ErrorKind::kType, "keys", "a tensor, as keys_weight is given", "nothing");
  }
  if (a.cos.present() != a.sin.present()) {
    fail(ErrorKind::kType, a.cos.present() ? "sin" : "cos", "a tensor, as its partner is given", "nothing");
  }
  if (a.cos.present()) {
    check::tensor(a.cos, "cos", DType::kFloat32, device, {a.tokens, dim});
    check::tensor(a.sin, "sin", DType::kFloat32, device, {a.tokens, dim});
    check::rows_within(a.row_offset, rows, a.tokens, "x");
  }
  check::eps(a.eps);
  TileSymbols tiles;
  tiles.cache = a.cache;
  tiles.heads = a.x.size(2);
  tiles.tokens = a.tokens;
  tiles.row_offset = a.row_offset;
  tiles.block_q = a.block_q;
  check::tiles(tiles, a.x.size(0), rows, device, "x");
  check::disjoint(a.x, "x", a.keys, "keys");
  for (const TensorView* written : {&a.x, &a.keys}) {
    const char* name = written == &a.x ? "x" : "keys";
    check::disjoint(*written, name, a.weight, "weight");
    check::disjoint(*written, name, a.keys_weight, "keys_weight");
    check::disjoint(*written, name, a.cos, "cos");
    check::disjoint(*written, name, a.sin, "sin");
    check::disjoint(*written, name, a.cache, "symbols.cache");
  }
}

}  // namespace

void block_mean(const BlockMeanArguments& a, const Context& context) {
  check::float_tensor(a.x, "x");
  check::tensor(a.x, "x", a.x.dtype, a.x.device, {check::kAny, check::kAny, check::kAny, check::kAny});
  check::head_dim(a.x.size(3), "x");
  check_measures(a.x, a.block, a.out, "out", a.similarity);
  check::threads(context);
  const Backend& backend = backend_for(a.x.device);
  if (a.out.numel() > 0) backend.block_mean(a, context);
}

size_t select_flashomni_workspace(const SelectArguments& arguments, const Context& context) {
  return check_all(arguments, context).select_flashomni_workspace(arguments, context);
}

void select_flashomni(const SelectArguments& arguments, const Context& context) {
  const Backend& backend = check_all(arguments, context);
  check::workspace(context, backend.select_flashomni_workspace(arguments, context));
  if (arguments.q_mean.size(0) > 0) backend.select_flashomni(arguments, context);
}

void summarize_symbols(const SummarizeArguments& a, const Context& context) {
  check_summary(a);
  check::threads(context);
  backend_for(a.symbols.cache.device).summarize_symbols(a, context);
}

void norm_rope(const NormRopeArguments& a, const Context& context) {
  check_norm_rope(a);
  check::threads(context);
  const Backend& backend = backend_for(a.x.device);
  if (a.x.numel() > 0) backend.norm_rope(a, context);
}

void norm_rope_mean(const NormRopeMeanArguments& a, const Context& context) {
  const NormRopeArguments& rows = a.rows;
  if (rows.cache.present()) {
    fail(ErrorKind::kValue, "symbols.cache", "nothing: means are of all rows", describe(rows.cache));
  }
  if (rows.keys.present()) {
    fail(ErrorKind::kValue, "keys", "nothing: means are of x alone", describe(rows.keys));
  }
  check_norm_rope(rows);
  if (rows.weight.present() && rows.weight.size(0) != rows.x.size(3)) {
    fail(ErrorKind::kNotImplemented, "weight", text("[", rows.x.size(3), "]: a norm over each head"),
         describe(rows.weight));
  }
  check_measures(rows.x, a.block, a.mean, "mean", a.similarity);
  for (const TensorView* read : {&rows.weight, &rows.cos, &rows.sin}) {
    const char* name = read == &rows.weight ? "weight" : read == &rows.cos ? "cos" : "sin";
    check::disjoint(a.mean, "mean", *read, name);
    check::disjoint(a.similarity, "similarity", *read, name);
  }
  check::threads(context);
  const Backend& backend = backend_for(rows.x.device);
  if (rows.x.numel() > 0) backend.norm_rope_mean(a, context);
}

}  // namespace flashomni
