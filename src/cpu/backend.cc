// The CPU's row of the backend table: every operator goes to the instruction set's kernels.
#include <omp.h>

#include "src/cpu/cpu.h"
#include "src/cpu/kernels.h"
#include "src/cpu/select.h"
#include "src/cpu/summarize.h"

namespace flashomni {
namespace {

int threads_of(const Context& context) {
  return context.threads > 0 ? context.threads : omp_get_max_threads();
}

template <auto kMember, class Arguments>
size_t workspace(const Arguments& arguments, const Context& context) {
  return (cpu::kernels().*kMember)(arguments, threads_of(context));
}
template <auto kMember, class Arguments>
void run(const Arguments& arguments, const Context& context) {
  (cpu::kernels().*kMember)(arguments, threads_of(context));
}
template <auto kMember, class Arguments>
void run_in(const Arguments& arguments, const Context& context) {
  (cpu::kernels().*kMember)(arguments, context.workspace, threads_of(context));
}

size_t select_workspace(const SelectArguments& arguments, const Context& context) {
  return cpu::select_workspace(arguments, threads_of(context));
}
void select(const SelectArguments& arguments, const Context& context) {
  cpu::select(arguments, context.workspace, threads_of(context));
}

void summarize(const SummarizeArguments& arguments, const Context& context) {
  cpu::summarize(arguments, threads_of(context));
}

/// Rows go through the caches twice, which is no more than they cost: the CPU computes longer than it reads.
void norm_then_mean(const NormRopeMeanArguments& arguments, const Context& context) {
  BlockMeanArguments mean;
  mean.x = arguments.rows.x, mean.out = arguments.mean, mean.similarity = arguments.similarity;
  mean.block = arguments.block;
  cpu::kernels().norm_rope(arguments.rows, threads_of(context));
  cpu::kernels().block_mean(mean, threads_of(context));
}

bool serves(Device device, std::string* reason) {
  const bool served = device.type == DeviceType::kCPU;
  if (reason != nullptr) {
    *reason = served ? std::string("instruction set ") + cpu::kernels().isa : "serves CPU tensors only";
  }
  return served;
}

}  // namespace

const Backend& cpu_backend() {
  using cpu::KernelTable;
  static const Backend backend = {
      .name = "cpu",
      .device = DeviceType::kCPU,
      .serves = serves,
      .attention_workspace = workspace<&KernelTable::attention_workspace, AttentionArguments>,
      .attention = run_in<&KernelTable::attention, AttentionArguments>,
      .gemm_q_workspace = workspace<&KernelTable::gemm_q_workspace, GemmQArguments>,
      .gemm_q = run_in<&KernelTable::gemm_q, GemmQArguments>,
      .gemm_o_update_workspace = workspace<&KernelTable::gemm_o_update_workspace, GemmOUpdateArguments>,
      .gemm_o_update = run_in<&KernelTable::gemm_o_update, GemmOUpdateArguments>,
      .gemm_o_dispatch_workspace = workspace<&KernelTable::gemm_o_dispatch_workspace, GemmODispatchArguments>,
      .gemm_o_dispatch = run_in<&KernelTable::gemm_o_dispatch, GemmODispatchArguments>,
      .block_mean = run<&KernelTable::block_mean, BlockMeanArguments>,
      .select_flashomni_workspace = select_workspace,
      .select_flashomni = select,
      .summarize_symbols = summarize,
      .norm_rope = run<&KernelTable::norm_rope, NormRopeArguments>,
      .norm_rope_mean = norm_then_mean,
      .ada_layer_norm = run<&KernelTable::ada_layer_norm, AdaLayerNormArguments>,
      .taylor_update = run<&KernelTable::taylor_update, TaylorUpdateArguments>,
      .taylor_forecast = run<&KernelTable::taylor_forecast, TaylorForecastArguments>,
      .quantize_fp8 = run<&KernelTable::quantize_fp8, QuantizeArguments>,
  };
  return backend;
}

}  // namespace flashomni
