// The paper's selection on the CPU.
#pragma once

#include <cstddef>

#include "flashomni/select.h"

namespace flashomni::cpu {

size_t select_workspace(const SelectArguments& arguments, int threads);
void select(const SelectArguments& arguments, void* workspace, int threads);

}  // namespace flashomni::cpu
