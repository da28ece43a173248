// The operators as Python sees them: positional arguments in the order of python/flashomni/ops. Optional
// tensors may be None. The last two of each are the workspace and a setting of the device (see make_context);
// see run_within for the returned number.
#include "convert.h"
#include "flashomni/ada_layer_norm.h"
#include "flashomni/attention.h"
#include "flashomni/forecast.h"
#include "flashomni/gemm.h"
#include "flashomni/select.h"

namespace flashomni::bindings {
namespace {

int64_t attention(Tensor q, Tensor k, Tensor v, OptionalTensor cache, OptionalTensor skip,
                  OptionalTensor cache_indptr, OptionalTensor skip_indptr, Tensor out, OptionalTensor lse,
                  OptionalTensor q_indptr, OptionalTensor kv_indptr, OptionalTensor k_mean,
                  OptionalTensor v_mean, OptionalTensor kv_block_len, double scale, bool causal,
                  int64_t block_q, int64_t block_kv, OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    AttentionArguments arguments;
    arguments.q = view(q, "q");
    arguments.k = view(k, "k");
    arguments.v = view(v, "v");
    arguments.symbols.cache = view(cache, "symbols.cache");
    arguments.symbols.skip = view(skip, "symbols.skip");
    arguments.symbols.cache_indptr = view(cache_indptr, "symbols.cache_indptr");
    arguments.symbols.skip_indptr = view(skip_indptr, "symbols.skip_indptr");
    arguments.symbols.block_q = narrow(block_q, "symbols.block_q");
    arguments.symbols.block_kv = narrow(block_kv, "symbols.block_kv");
    arguments.out = view(out, "out");
    arguments.lse = view(lse, "lse");
    arguments.q_indptr = view(q_indptr, "q_indptr");
    arguments.kv_indptr = view(kv_indptr, "kv_indptr");
    arguments.k_mean = view(k_mean, "k_mean");
    arguments.v_mean = view(v_mean, "v_mean");
    arguments.kv_block_len = view(kv_block_len, "kv_block_len");
    arguments.scale = static_cast<float>(scale);
    arguments.causal = causal;
    return run_within(arguments, make_context(q, setting), workspace, &attention_workspace,
                      &flashomni::attention);
  });
}

TileSymbols tile_symbols(const OptionalTensor& cache, const OptionalTensor& cache_indptr, int64_t heads,
                         int64_t tokens, int64_t row_offset, int64_t block_q) {
  TileSymbols tiles;
  tiles.cache = view(cache, "symbols.cache");
  tiles.cache_indptr = view(cache_indptr, "symbols.cache_indptr");
  tiles.heads = heads;
  tiles.tokens = tokens;
  tiles.row_offset = row_offset;
  tiles.block_q = narrow(block_q, "symbols.block_q");
  return tiles;
}

int64_t gemm_q(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor cache,
               OptionalTensor cache_indptr, Tensor out, int64_t heads, int64_t tokens, int64_t row_offset,
               int64_t block_q, int64_t activation, OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    GemmQArguments arguments;
    arguments.x = view(x, "x");
    arguments.weight = view(weight, "weight");
    arguments.bias = view(bias, "bias");
    arguments.out = view(out, "out");
    arguments.tiles = tile_symbols(cache, cache_indptr, heads, tokens, row_offset, block_q);
    arguments.activation = static_cast<Activation>(activation);
    return run_within(arguments, make_context(x, setting), workspace, &gemm_q_workspace, &flashomni::gemm_q);
  });
}

int64_t gemm_o_update(Tensor o, OptionalTensor o1, OptionalTensor o2, OptionalTensor o3, OptionalTensor past,
                      Tensor weight, OptionalTensor bias, OptionalTensor cache, OptionalTensor cache_indptr,
                      Tensor out, Tensor cached, OptionalTensor cached1, OptionalTensor cached2,
                      OptionalTensor cached3, int64_t head_dim, int64_t heads, int64_t tokens,
                      int64_t row_offset, int64_t block_q, bool keep_rows, OptionalTensor workspace,
                      int64_t setting) {
  return guarded([&] {
    GemmOUpdateArguments arguments;
    arguments.orders = view_all({o, o1, o2, o3}, "o and its derivatives", &arguments.o);
    const int32_t caches = view_all({cached, cached1, cached2, cached3}, "cached", &arguments.cached);
    if (caches != arguments.orders) {
      fail(ErrorKind::kValue, "cached", text(arguments.orders, " tensors, one more than derivatives"),
           text(caches));
    }
    arguments.past = view(past, "past");
    arguments.weight = view(weight, "weight");
    arguments.bias = view(bias, "bias");
    arguments.out = view(out, "out");
    arguments.head_dim = head_dim;
    arguments.tiles = tile_symbols(cache, cache_indptr, heads, tokens, row_offset, block_q);
    arguments.keep_rows = keep_rows;
    return run_within(arguments, make_context(o, setting), workspace, &gemm_o_update_workspace,
                      &flashomni::gemm_o_update);
  });
}

int64_t gemm_o_dispatch(Tensor o, OptionalTensor past, Tensor weight, Tensor cached, OptionalTensor cached1,
                        OptionalTensor cached2, OptionalTensor cached3, Tensor coefficients,
                        OptionalTensor cache, OptionalTensor cache_indptr, Tensor out, int64_t head_dim,
                        int64_t heads, int64_t tokens, int64_t row_offset, int64_t block_q, bool keep_rows,
                        OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    GemmODispatchArguments arguments;
    arguments.o = view(o, "o");
    arguments.past = view(past, "past");
    arguments.weight = view(weight, "weight");
    arguments.orders = view_all({cached, cached1, cached2, cached3}, "cached", &arguments.cached);
    arguments.coefficients = view(coefficients, "coefficients");
    arguments.out = view(out, "out");
    arguments.head_dim = head_dim;
    arguments.tiles = tile_symbols(cache, cache_indptr, heads, tokens, row_offset, block_q);
    arguments.keep_rows = keep_rows;
    return run_within(arguments, make_context(o, setting), workspace, &gemm_o_dispatch_workspace,
                      &flashomni::gemm_o_dispatch);
  });
}

int64_t select_flashomni(Tensor q_mean, Tensor k_mean, Tensor cache, Tensor skip, OptionalTensor ramp,
                         OptionalTensor k_similarity, int64_t tokens, int64_t text_start, int64_t text_length,
                         double tau_q, double tau_kv, double s_q, double scale, double self_similarity,
                         int64_t block_q, int64_t block_kv, OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    SelectArguments arguments;
    arguments.q_mean = view(q_mean, "q_mean");
    arguments.k_mean = view(k_mean, "k_mean");
    arguments.symbols.cache = view(cache, "symbols.cache");
    arguments.symbols.skip = view(skip, "symbols.skip");
    arguments.symbols.block_q = narrow(block_q, "symbols.block_q");
    arguments.symbols.block_kv = narrow(block_kv, "symbols.block_kv");
    arguments.ramp = view(ramp, "ramp");
    arguments.tokens = tokens;
    arguments.text_start = text_start;
    arguments.text_length = text_length;
    arguments.tau_q = static_cast<float>(tau_q);
    arguments.tau_kv = static_cast<float>(tau_kv);
    arguments.s_q = static_cast<float>(s_q);
    arguments.scale = static_cast<float>(scale);
    arguments.k_similarity = view(k_similarity, "k_similarity");
    arguments.self_similarity = static_cast<float>(self_similarity);
    return run_within(arguments, make_context(q_mean, setting), workspace, &select_flashomni_workspace,
                      &flashomni::select_flashomni);
  });
}

/// For the operators that need no workspace: they take none and return 0 alike.
template <class Arguments>
size_t no_workspace(const Arguments&, const Context&) {
  return 0;
}

int64_t summarize_symbols(Tensor cache, Tensor skip, Tensor rows, Tensor shares, Tensor awake, int64_t heads,
                          int64_t q_tokens, int64_t kv_tokens, int64_t block_q, int64_t block_kv,
                          OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    SummarizeArguments arguments;
    arguments.symbols.cache = view(cache, "symbols.cache");
    arguments.symbols.skip = view(skip, "symbols.skip");
    arguments.symbols.block_q = narrow(block_q, "symbols.block_q");
    arguments.symbols.block_kv = narrow(block_kv, "symbols.block_kv");
    arguments.heads = heads;
    arguments.q_tokens = q_tokens;
    arguments.kv_tokens = kv_tokens;
    arguments.rows = view(rows, "rows");
    arguments.shares = view(shares, "shares");
    arguments.awake = view(awake, "awake");
    return run_within(arguments, make_context(cache, setting), workspace, &no_workspace<SummarizeArguments>,
                      &flashomni::summarize_symbols);
  });
}

int64_t block_mean(Tensor x, Tensor out, OptionalTensor similarity, int64_t block, OptionalTensor workspace,
                   int64_t setting) {
  return guarded([&] {
    BlockMeanArguments arguments;
    arguments.x = view(x, "x");
    arguments.out = view(out, "out");
    arguments.similarity = view(similarity, "similarity");
    arguments.block = narrow(block, "block");
    return run_within(arguments, make_context(x, setting), workspace, &no_workspace<BlockMeanArguments>,
                      &flashomni::block_mean);
  });
}

int64_t norm_rope(Tensor x, OptionalTensor weight, OptionalTensor cos, OptionalTensor sin,
                  OptionalTensor cache, OptionalTensor keys, OptionalTensor keys_weight, double eps,
                  int64_t row_offset, int64_t tokens, int64_t block_q, OptionalTensor workspace,
                  int64_t setting) {
  return guarded([&] {
    NormRopeArguments arguments;
    arguments.x = view(x, "x");
    arguments.weight = view(weight, "weight");
    arguments.cos = view(cos, "cos");
    arguments.sin = view(sin, "sin");
    arguments.cache = view(cache, "symbols.cache");
    arguments.keys = view(keys, "keys");
    arguments.keys_weight = view(keys_weight, "keys_weight");
    arguments.eps = static_cast<float>(eps);
    arguments.row_offset = row_offset;
    arguments.tokens = tokens;
    arguments.block_q = narrow(block_q, "symbols.block_q");
    return run_within(arguments, make_context(x, setting), workspace, &no_workspace<NormRopeArguments>,
                      &flashomni::norm_rope);
  });
}

int64_t ada_layer_norm(Tensor x, Tensor scale, Tensor shift, Tensor out, double eps, OptionalTensor workspace,
                       int64_t setting) {
  return guarded([&] {
    AdaLayerNormArguments arguments;
    arguments.x = view(x, "x");
    arguments.scale = view(scale, "scale");
    arguments.shift = view(shift, "shift");
    arguments.out = view(out, "out");
    arguments.eps = static_cast<float>(eps);
    return run_within(arguments, make_context(x, setting), workspace, &no_workspace<AdaLayerNormArguments>,
                      &flashomni::ada_layer_norm);
  });
}

int64_t norm_rope_mean(Tensor x, OptionalTensor weight, OptionalTensor cos, OptionalTensor sin, Tensor mean,
                       OptionalTensor similarity, double eps, int64_t row_offset, int64_t tokens,
                       int64_t block, OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    NormRopeMeanArguments arguments;
    arguments.rows.x = view(x, "x");
    arguments.rows.weight = view(weight, "weight");
    arguments.rows.cos = view(cos, "cos");
    arguments.rows.sin = view(sin, "sin");
    arguments.rows.eps = static_cast<float>(eps);
    arguments.rows.row_offset = row_offset;
    arguments.rows.tokens = tokens;
    arguments.mean = view(mean, "mean");
    arguments.similarity = view(similarity, "similarity");
    arguments.block = narrow(block, "block");
    return run_within(arguments, make_context(x, setting), workspace, &no_workspace<NormRopeMeanArguments>,
                      &flashomni::norm_rope_mean);
  });
}

int64_t taylor_update(Tensor feature, Tensor derivative, OptionalTensor derivative1,
                      OptionalTensor derivative2, OptionalTensor derivative3, OptionalTensor scale,
                      OptionalTensor scale1, OptionalTensor scale2, OptionalTensor scale3,
                      OptionalTensor last, double gap, int64_t valid, OptionalTensor workspace,
                      int64_t setting) {
  return guarded([&] {
    TaylorUpdateArguments arguments;
    arguments.feature = view(feature, "feature");
    arguments.orders =
        view_all({derivative, derivative1, derivative2, derivative3}, "derivatives", &arguments.derivatives);
    view_all({scale, scale1, scale2, scale3}, "scales", &arguments.scales);
    arguments.last = view(last, "last");
    arguments.gap = static_cast<float>(gap);
    arguments.valid = narrow(valid, "valid");
    return run_within(arguments, make_context(feature, setting), workspace,
                      &no_workspace<TaylorUpdateArguments>, &flashomni::taylor_update);
  });
}

int64_t taylor_forecast(Tensor derivative, OptionalTensor derivative1, OptionalTensor derivative2,
                        OptionalTensor derivative3, OptionalTensor scale, OptionalTensor scale1,
                        OptionalTensor scale2, OptionalTensor scale3, Tensor coefficients,
                        OptionalTensor cache, OptionalTensor cache_indptr, Tensor out, int64_t heads,
                        int64_t tokens, int64_t row_offset, int64_t block_q, int64_t rows,
                        OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    TaylorForecastArguments arguments;
    arguments.orders =
        view_all({derivative, derivative1, derivative2, derivative3}, "derivatives", &arguments.derivatives);
    view_all({scale, scale1, scale2, scale3}, "scales", &arguments.scales);
    arguments.coefficients = view(coefficients, "coefficients");
    arguments.out = view(out, "out");
    arguments.tiles = tile_symbols(cache, cache_indptr, heads, tokens, row_offset, block_q);
    arguments.rows = static_cast<ForecastRows>(narrow(rows, "rows"));
    return run_within(arguments, make_context(derivative, setting), workspace,
                      &no_workspace<TaylorForecastArguments>, &flashomni::taylor_forecast);
  });
}

int64_t quantize_fp8(Tensor x, Tensor values, Tensor scales, OptionalTensor workspace, int64_t setting) {
  return guarded([&] {
    QuantizeArguments arguments;
    arguments.x = view(x, "x");
    arguments.values = view(values, "values");
    arguments.scales = view(scales, "scales");
    return run_within(arguments, make_context(x, setting), workspace, &no_workspace<QuantizeArguments>,
                      &flashomni::quantize_fp8);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_q, gemm_q);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_o_update, gemm_o_update);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_o_dispatch, gemm_o_dispatch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select_flashomni, select_flashomni);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(summarize_symbols, summarize_symbols);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(block_mean, block_mean);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope, norm_rope);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope_mean, norm_rope_mean);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ada_layer_norm, ada_layer_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(taylor_update, taylor_update);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(taylor_forecast, taylor_forecast);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_fp8, quantize_fp8);

}  // namespace flashomni::bindings
