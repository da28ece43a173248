// The counter of claims, which the GEMMs find zero and leave zero.
#pragma once

#include <cuda_runtime.h>

#include "flashomni/backend.h"

namespace flashomni::cuda::sm90 {

/// The caller's counter; where there is none, memory at the begin of the workspace, which a launch sets to
/// zero.
int* zero_counter(const Context& context, int device);

}  // namespace flashomni::cuda::sm90
