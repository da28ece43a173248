// Block-sparse attention on Hopper: see README.md beside this file for how it works.
#pragma once

#include "flashomni/attention.h"

namespace flashomni::cuda::sm90 {

size_t attention_workspace(const AttentionArguments& arguments, const Context& context);
void attention(const AttentionArguments& arguments, const Context& context);

}  // namespace flashomni::cuda::sm90
