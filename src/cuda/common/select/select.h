// The paper's selection on a GPU, and what symbols come to.
#pragma once

#include "flashomni/select.h"

namespace flashomni::cuda {

/// Three launches, whose shapes depend on the tensors' shapes alone; nothing is read back.
size_t select_workspace(const SelectArguments& arguments, const Context& context);
void select(const SelectArguments& arguments, const Context& context);

/// One launch.
void summarize(const SummarizeArguments& arguments, const Context& context);

}  // namespace flashomni::cuda
