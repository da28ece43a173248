// The sparse GEMMs on Hopper: see README.md beside this file for how they work.
#pragma once

#include "flashomni/gemm.h"

namespace flashomni::cuda::sm90 {

size_t gemm_q_workspace(const GemmQArguments& arguments, const Context& context);
void gemm_q(const GemmQArguments& arguments, const Context& context);
size_t gemm_o_update_workspace(const GemmOUpdateArguments& arguments, const Context& context);
void gemm_o_update(const GemmOUpdateArguments& arguments, const Context& context);
size_t gemm_o_dispatch_workspace(const GemmODispatchArguments& arguments, const Context& context);
void gemm_o_dispatch(const GemmODispatchArguments& arguments, const Context& context);

}  // namespace flashomni::cuda::sm90
