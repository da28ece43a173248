// Compiled once for each instruction set, with FLASHOMNI_ISA naming it: all kernels of that set, and their
// table.
#include "src/cpu/kernels.h"

#include "src/cpu/attention_kernel.h"
#include "src/cpu/elementwise_kernel.h"
#include "src/cpu/gemm_kernel.h"

#define FLASHOMNI_JOIN_(a, b) a##b
#define FLASHOMNI_JOIN(a, b) FLASHOMNI_JOIN_(a, b)
#define FLASHOMNI_STRING_(a) #a
#define FLASHOMNI_STRING(a) FLASHOMNI_STRING_(a)

namespace flashomni::cpu {

const KernelTable FLASHOMNI_JOIN(FLASHOMNI_ISA, _kernels) = {
    .isa = FLASHOMNI_STRING(FLASHOMNI_ISA),
    .attention_workspace = FLASHOMNI_ISA::attention_workspace,
    .attention = FLASHOMNI_ISA::attention,
    .gemm_q_workspace = FLASHOMNI_ISA::gemm_q_workspace,
    .gemm_q = FLASHOMNI_ISA::gemm_q,
    .gemm_o_update_workspace = FLASHOMNI_ISA::gemm_o_update_workspace,
    .gemm_o_update = FLASHOMNI_ISA::gemm_o_update,
    .gemm_o_dispatch_workspace = FLASHOMNI_ISA::gemm_o_dispatch_workspace,
    .gemm_o_dispatch = FLASHOMNI_ISA::gemm_o_dispatch,
    .block_mean = FLASHOMNI_ISA::block_mean,
    .norm_rope = FLASHOMNI_ISA::norm_rope,
    .ada_layer_norm = FLASHOMNI_ISA::ada_layer_norm,
    .taylor_update = FLASHOMNI_ISA::taylor_update,
    .taylor_forecast = FLASHOMNI_ISA::taylor_forecast,
    .quantize_fp8 = FLASHOMNI_ISA::quantize_fp8,
};

}  // namespace flashomni::cpu
