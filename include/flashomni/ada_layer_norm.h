// The adaptive norm before a DiT block's projections (adaLN, arXiv 2212.09748).
#pragma once

#include "flashomni/backend.h"
#include "flashomni/tensor.h"

namespace flashomni {

/// out = layer_norm(x) * (1 + scale) + shift, the norm over the last dimension, without weights of its own
/// and in float32 throughout. x, out [B, M, C]; scale, shift [B, C]; one float type. cuda_sm90 takes C up to
/// 12,288, else NotImplementedError.
struct AdaLayerNormArguments {
  TensorView x, scale, shift, out;
  float eps = 1e-6f;
};
FLASHOMNI_API void ada_layer_norm(const AdaLayerNormArguments& arguments, const Context& context);

}  // namespace flashomni
