// The plan: symbols become a list of active tiles, in an order good for the caches and the tail.
#pragma once

#include "src/cuda/sm90/attention/problem.cuh"

namespace flashomni::cuda::sm90 {

/// Writes `items` and `control`, and `partial` where the problem has block lengths. One launch of fixed shape.
/// `heads_a_group`: heads whose keys and values share the L2 cache; longest tiles first within such a group.
void launch_plan(const Problem& problem, int heads_a_group, Item* items, Control* control, uint32_t* partial,
                 cudaStream_t stream);

/// The most tiles that `problem` can have.
int64_t most_tiles(const Problem& problem);

}  // namespace flashomni::cuda::sm90
