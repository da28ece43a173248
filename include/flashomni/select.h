// From queries and keys to symbols: block means, and the paper's choice of what to cache and what to skip;
// and what symbols come to.
#pragma once

#include "flashomni/backend.h"
#include "flashomni/symbols.h"
#include "flashomni/tensor.h"

namespace flashomni {

/// out[b, i, h] = mean of x[b, t, h] over the tokens t of block i. x [B, N, H, D] any float type, out float32
/// [B, ceil(N / block), H, D].
///
/// similarity, float32 [B, ceil(N / block), H] or absent: how alike the tokens of each block are, from the
/// same read: the mean cosine over all pairs of them (SpargeAttn, arXiv 2502.18137), which is |sum of unit
/// vectors|^2 / n^2. A token of zeros has no direction and counts as a cosine of 0.
struct BlockMeanArguments {
  TensorView x, out, similarity;
  int32_t block = 128;
};
FLASHOMNI_API void block_mean(const BlockMeanArguments& arguments, const Context& context);

/// The multi-granularity selection of FlashOmni (arXiv 2509.25401, section 3): block means in, packed bits
/// out.
///
/// With P = scale * q_mean k_mean^T a head, softmaxes over it and text blocks = blocks that hold any text
/// token:
///   C_i = sum over text rows j of softmax_row(P)[j, i]          what the text takes from vision block i
///   G_i = sum over text columns j of softmax_i(P[i, j])         what vision block i takes from the text
/// the vision blocks with the smallest mean share of C and G are cached while their cumulative share <=
/// tau_q; in each vision row the KV blocks with the smallest softmax mass are skipped while their cumulative
/// mass <= tau_kv. Text rows and text columns are never cached nor skipped, a row keeps at least one block.
/// A KV block whose k_similarity is not above self_similarity is never skipped either: its mean does not
/// stand for its tokens. Without text (text_length 0) nothing is cached. A tau of 1 takes all that may be
/// taken. Where the share of active tiles of a batch element is <= s_q, all of its S_c bits become 0.
/// Non-finite scores count as the lowest: the symbols are always valid.
struct SelectArguments {
  TensorView q_mean;   ///< float32 [B, q_blocks, H, D]
  TensorView k_mean;   ///< float32 [B, kv_blocks, Hkv, D]
  Symbols symbols;     ///< written: cache [B, cache_bytes], skip [B, skip_bytes]; bits of cached rows are 0
  int64_t tokens = 0;  ///< joint sequence length
  int64_t text_start = 0;       ///< first text token
  int64_t text_length = 0;      ///< text tokens
  float tau_q = 0, tau_kv = 0;  ///< in [0, 1]
  float s_q = 0;                ///< in [0, 1]; 0 switches layer-wide reuse off
  float scale = 0;              ///< 0 means 1 / sqrt(D)
  TensorView ramp;              ///< optional float32 [1], on the device: scales both taus, within [0, 1], so
                                ///<   that a graph that was captured once can follow it
  TensorView k_similarity;      ///< optional float32 [B, kv_blocks, Hkv], as block_mean gives it
  float self_similarity = 0;    ///< in [0, 1]; of no effect without k_similarity
};
FLASHOMNI_API size_t select_flashomni_workspace(const SelectArguments& arguments, const Context& context);
FLASHOMNI_API void select_flashomni(const SelectArguments& arguments, const Context& context);

/// What symbols come to, from one read of their bits; padding bits are not looked at.
struct SummarizeArguments {
  Symbols symbols;  ///< cache [B, cache_bytes], skip [B, skip_bytes]: both present, without indptr
  int64_t heads = 0, q_tokens = 0, kv_tokens = 0;
  TensorView rows;    ///< uint8 [B, ceil(q_blocks / 8)], S_c of one head: the row block has an active head
  TensorView shares;  ///< float32 [2, H], over batch and rows: the selected share of block pairs (those of
                      ///<   cached tiles are not), the share of active tiles
  TensorView awake;   ///< uint8 [B]: 1 where the element has an active tile, else 0
};
FLASHOMNI_API void summarize_symbols(const SummarizeArguments& arguments, const Context& context);

/// In place on active tiles: x = rope(rms_norm(x) * weight). x [B, N, H, D]; weight of x's dtype: [D], a norm
/// over each head; [H * D], one norm over all heads of a token; or absent, no norm. cos, sin float32
/// [tokens, D], the joint sequence's rows, or absent (no rotation); pairs are (2i, 2i + 1).
///
/// A norm over all heads reads those of cached tiles too, where the token's row block has an active tile.
/// The CPU takes any width, cuda_sm90 all up to 16,384 and what more a CTA holds: else NotImplementedError.
///
/// keys [B, N, H_k, D], of x's dtype and the same tokens, or absent: the same in the same pass on all of
/// their tiles, whatever the symbols say, by keys_weight in place of weight.
struct NormRopeArguments {
  TensorView x, weight, cos, sin;
  float eps = 1e-6f;
  TensorView cache;        ///< S_c as in TileSymbols; absent: every tile of x
  int64_t row_offset = 0;  ///< where x's first token lies in the joint sequence
  int64_t tokens = 0;      ///< joint sequence length
  int32_t block_q = 128;
  TensorView keys;
  TensorView keys_weight;  ///< [D], [H_k * D] or absent
};
FLASHOMNI_API void norm_rope(const NormRopeArguments& arguments, const Context& context);

/// norm_rope on all of `rows.x` (rows.cache and rows.keys absent, the norm over each head), and block_mean of
/// what it leaves there, on a GPU in one read. Blocks are counted from the first row of x: mean [B, ceil(N /
/// block), H, D], similarity [B, ceil(N / block), H] or absent.
struct NormRopeMeanArguments {
  NormRopeArguments rows;
  TensorView mean, similarity;
  int32_t block = 128;
};
FLASHOMNI_API void norm_rope_mean(const NormRopeMeanArguments& arguments, const Context& context);

}  // namespace flashomni
