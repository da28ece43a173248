// What every launch on Hopper needs of the host.
#pragma once

#include "src/cuda/common/launch.h"

namespace flashomni::cuda::sm90 {

using cuda::check_cuda;
using cuda::kMaxDevices;
using cuda::multiprocessors;
using cuda::PerDevice;

}  // namespace flashomni::cuda::sm90
