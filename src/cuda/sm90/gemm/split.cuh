// Split tiles: where the last tiles of GEMM-Q would leave SMs idle, these come first, cut along the reduction
// so that every CTA gets an equal stretch of it. Parts leave their sums in the workspace; the last to come
// adds them up in order, so that the result is the same at every run. No CTA waits for another.
#pragma once

#include <cstdint>

namespace flashomni::cuda::sm90 {

/// Parts of a tile at most (on average): each costs the tile's last part a read.
inline constexpr int kMostPartsATile = 5;
/// What writing and adding parts takes, in steps of the main loop: an estimate.
inline constexpr int kSplitCostSteps = 10;

/// The most tiles worth splitting over `ctas`: with more, a whole round takes no longer.
__host__ __device__ inline int most_split_tiles(int ctas, int steps) {
  return steps <= kSplitCostSteps ? 0 : static_cast<int>(int64_t(ctas) * (steps - kSplitCostSteps) / steps);
}

/// `tiles` tiles of `steps` steps, side by side, over `ctas` CTAs, of which each takes at least one step.
struct QSplit {
  int tiles, steps, ctas;

  __device__ int begin(int cta) const { return static_cast<int>(int64_t(tiles) * steps * cta / ctas); }
  /// The CTA that takes a step.
  __device__ int owner(int step) const {
    return static_cast<int>((int64_t(step + 1) * ctas - 1) / (int64_t(tiles) * steps));
  }
};

/// Parts in the workspace: those of a tile lie side by side, as its CTAs do.
__host__ __device__ inline int part_slot(int cta, int tile) {
  return cta + tile;
}

}  // namespace flashomni::cuda::sm90
