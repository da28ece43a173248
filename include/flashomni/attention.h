// Block-sparse attention that obeys any symbols.
#pragma once

#include "flashomni/backend.h"
#include "flashomni/symbols.h"
#include "flashomni/tensor.h"

namespace flashomni {

/// out = softmax(scale * q k^T) v over the selected blocks of each active tile.
///
/// Batched: q [B, Nq, H, D], k and v [B, Nkv, Hkv, D]. Ragged: q [Tq, H, D], k and v [Tkv, Hkv, D] with
/// indptrs. H is a multiple of Hkv. Any strides whose last one is 1. float32 (CPU only), float16, bfloat16; D
/// one of 64, 72, 80, 96, 128, 256. Accumulation in float32. A cached tile (S_c bit 0) leaves its rows of
/// `out` and `lse` as they were; an active tile with no selected key gives out = 0 and lse = -inf.
struct AttentionArguments {
  TensorView q, k, v;
  Symbols symbols;
  TensorView out;        ///< shape and dtype of q
  TensorView lse;        ///< optional float32 [B, Nq, H] or [Tq, H]; base 2: log2 of the sum of exponentials
  TensorView q_indptr;   ///< ragged: int32 [B + 1], tokens
  TensorView kv_indptr;  ///< ragged: int32 [B + 1], tokens
  TensorView
      k_mean;  ///< optional float32 [B, kv_blocks, Hkv, D]: with v_mean, a skipped block is not dropped
  TensorView v_mean;        ///<   but stood for by its mean key and value, weighted by its length
  TensorView kv_block_len;  ///< optional int32 [kv_blocks]: valid tokens at the head of each block
  float scale = 0.0f;       ///< 0 means 1 / sqrt(D)
  bool causal = false;      ///< token-exact; the last query sees the last key (bottom-right)
};

/// Bytes of workspace that attention() needs for these arguments.
FLASHOMNI_API size_t attention_workspace(const AttentionArguments& arguments, const Context& context);
FLASHOMNI_API void attention(const AttentionArguments& arguments, const Context& context);

}  // namespace flashomni
