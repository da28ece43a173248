// The sparse linear layers of an attention block. Weights are torch's: [out_features, in_features].
#pragma once

#include "flashomni/backend.h"
#include "flashomni/symbols.h"
#include "flashomni/tensor.h"

namespace flashomni {

/// Orders of forecast: 0 (plain reuse) to kMaxOrder; kMaxOrder + 1 cached tensors at most.
inline constexpr int kMaxOrder = 3;

enum class Activation : int32_t { kNone, kGeluTanh, kGelu };

/// Which rows of a joint sequence a matrix holds, and which of its (row block, head) tiles are active.
struct TileSymbols {
  TensorView cache;         ///< S_c: uint8 [B, bytes], or [total] with indptr; absent: every tile is active
  TensorView cache_indptr;  ///< int32 [B + 1], bytes
  int64_t heads = 1;        ///< heads of the symbols; 1 = one bit a row block
  int64_t tokens = 0;       ///< length of the joint sequence that the symbols describe
  int64_t row_offset = 0;   ///< where the matrix' first row lies in it; any number
  int32_t block_q = 128;    ///< tokens a row block
};

/// GEMM-Q: out = activation(x weight^T + bias) on active tiles only; other tiles of `out` stay as they were.
/// x [B, M, K], weight [N, K], bias [N] or absent, out [B, M, N]; N a multiple of `tiles.heads`.
struct GemmQArguments {
  TensorView x, weight, bias, out;
  TileSymbols tiles;
  Activation activation = Activation::kNone;
};

/// GEMM-O at an Update: cached[i] = (i == 0 ? bias : 0) + sum over cached heads of o[i]_h W_h^T, and
/// out = cached[0] + sum over active heads of o[0]_h W_h^T + the columns past the heads: for D = 0 exactly
/// one dense GEMM's work. o[0] [B, M, K] with K >= heads * head_dim: columns past the heads (a single block's
/// MLP) are always active. They may be a tensor of their own, `past` [B, M, columns past the heads], where
/// o[0] has the heads alone. o[i >= 1] [B, M, >= heads * head_dim]: the derivatives of o. weight [N, K]; bias
/// [N] or absent; out and cached[i] [B, M, N]. keep_rows: as the Dispatch steps to come have it, so that no
/// cached[i] is computed or written in rows of row blocks without an active head.
struct GemmOUpdateArguments {
  int32_t orders = 1;  ///< D + 1: how many of o and cached are used
  std::array<TensorView, kMaxOrder + 1> o, cached;
  TensorView past, weight, bias, out;
  int64_t head_dim = 0;  ///< a multiple of 8
  TileSymbols tiles;
  bool keep_rows = false;
};

/// GEMM-O at a Dispatch: out = sum_i coefficients[i] cached[i] + sum over active heads of o_h W_h^T + the
/// columns past the heads (`past` as in the Update). The bias is inside cached[0]. coefficients float32
/// [orders], on the tensors' device. keep_rows: rows of row blocks without an active head are neither
/// computed nor written, `out` keeps what it holds there; nothing of these rows is read.
struct GemmODispatchArguments {
  int32_t orders = 1;
  TensorView o, past, weight, coefficients, out;
  std::array<TensorView, kMaxOrder + 1> cached;
  int64_t head_dim = 0;  ///< a multiple of 8
  TileSymbols tiles;
  bool keep_rows = false;
};

FLASHOMNI_API size_t gemm_q_workspace(const GemmQArguments& arguments, const Context& context);
FLASHOMNI_API void gemm_q(const GemmQArguments& arguments, const Context& context);
FLASHOMNI_API size_t gemm_o_update_workspace(const GemmOUpdateArguments& arguments, const Context& context);
FLASHOMNI_API void gemm_o_update(const GemmOUpdateArguments& arguments, const Context& context);
FLASHOMNI_API size_t gemm_o_dispatch_workspace(const GemmODispatchArguments& arguments,
                                               const Context& context);
FLASHOMNI_API void gemm_o_dispatch(const GemmODispatchArguments& arguments, const Context& context);

}  // namespace flashomni
