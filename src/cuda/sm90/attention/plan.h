// The plan: symbols become lists of active tiles, in an order good for the caches and the tail.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/sm90/attention/problem.cuh"

namespace flashomni::cuda::sm90 {

struct PlanArguments {
  Problem problem;
  Grouping grouping;
  Item* items;  // [most_tiles]
  Control* control;
  uint32_t* partial;  // a bit a KV block, where the problem has block lengths
  int* arrivals;      // [arrival_count]: set to zero
  int arrival_count;
};

/// One launch, whose shape depends on the tensors' shapes alone.
void launch_plan(const PlanArguments& arguments, cudaStream_t stream);

/// `bytes_a_head`: keys and values of one head of the longest sequence.
Grouping grouping_of(const Problem& problem, int64_t bytes_a_head);

/// The most tiles that `problem` can have.
int64_t most_tiles(const Problem& problem);

}  // namespace flashomni::cuda::sm90
