// The plans: symbols become GEMM-Q's list of tiles, in an order good for the caches and the tail. GEMM-O
// reads the bits themselves; its plan only resets the counter of claims.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/common/bits.cuh"

namespace flashomni::cuda::sm90 {

struct QItem;
struct QControl;

/// Which tiles GEMM-Q may have.
struct QProblem {
  Bits cache;
  int batch, heads,
      groups;               // groups: of up to 128 features, a head; or pairs of groups that share the tokens
  int first_block, blocks;  // row blocks of the joint sequence that the matrix touches
  int block_q, row_offset;
  int sharers;  // blocks of a cluster
  bool shares_tokens;
  int item_blocks;  // row blocks an item: of the tile, or of both tiles that share the weight
  int clusters;     // of the kernel
};

struct QPlanArguments {
  QProblem problem;
  QItem* items;  // [most_items]
  QControl* control;
};

/// One launch, whose shape depends on the tensors' shapes alone.
void launch_q_plan(const QPlanArguments& arguments, cudaStream_t stream);
/// Sets `counter` to zero.
void launch_o_plan(int* counter, int device, cudaStream_t stream);

/// The most tiles that `problem` can have.
int64_t most_items(const QProblem& problem);
/// Throws NotImplementedError for what the plan has no room for.
void check_plan_serves(const QProblem& problem);

}  // namespace flashomni::cuda::sm90
