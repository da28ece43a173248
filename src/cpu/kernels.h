// What one instruction set's build of kernels.cc offers. The public argument structs come in checked.
#pragma once

#include <cstddef>

#include "flashomni/ada_layer_norm.h"
#include "flashomni/attention.h"
#include "flashomni/forecast.h"
#include "flashomni/gemm.h"
#include "flashomni/select.h"

namespace flashomni::cpu {

struct KernelTable {
  const char* isa;
  size_t (*attention_workspace)(const AttentionArguments&, int threads);
  void (*attention)(const AttentionArguments&, void* workspace, int threads);
  size_t (*gemm_q_workspace)(const GemmQArguments&, int threads);
  void (*gemm_q)(const GemmQArguments&, void* workspace, int threads);
  size_t (*gemm_o_update_workspace)(const GemmOUpdateArguments&, int threads);
  void (*gemm_o_update)(const GemmOUpdateArguments&, void* workspace, int threads);
  size_t (*gemm_o_dispatch_workspace)(const GemmODispatchArguments&, int threads);
  void (*gemm_o_dispatch)(const GemmODispatchArguments&, void* workspace, int threads);
  void (*block_mean)(const BlockMeanArguments&, int threads);
  void (*norm_rope)(const NormRopeArguments&, int threads);
  void (*ada_layer_norm)(const AdaLayerNormArguments&, int threads);
  void (*taylor_update)(const TaylorUpdateArguments&, int threads);
  void (*taylor_forecast)(const TaylorForecastArguments&, int threads);
  void (*quantize_fp8)(const QuantizeArguments&, int threads);
};

// One definition for each instruction set that the build has (FLASHOMNI_CPU_HAS_*).
extern const KernelTable generic_kernels, avx2_kernels, avx512_kernels, avx512bf16_kernels;

/// The table of the best instruction set here, or of the one that FLASHOMNI_CPU_ISA names.
const KernelTable& kernels();

}  // namespace flashomni::cpu
