// What symbols come to, on the CPU.
#pragma once

#include "flashomni/select.h"

namespace flashomni::cpu {

void summarize(const SummarizeArguments& arguments, int threads);

}  // namespace flashomni::cpu
