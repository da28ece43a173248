// Split tiles. Where the last wave of tiles leaves SMs idle, its tiles are cut into parts, runs of their steps,
// that are work of their own. A part leaves its sums unscaled in the workspace; the consumer warp that is the
// last to arrive adds all parts up, in their order, so that every run gives the same bits.
#pragma once

#include "src/cuda/sm90/attention/problem.cuh"

namespace flashomni::cuda::sm90 {

inline constexpr int kMostParts = 16;       // of one tile
inline constexpr float kStepsAPart = 10;  // what leaving and adding the sums costs, in steps

/// The most parts in flight, for `ctas` CTAs: what the workspace holds.
__host__ __device__ constexpr int most_parts(int ctas) {
  return 3 * ctas;
}

/// How `tiles` tiles of `steps` steps on average go over `ctas` CTAs: the first `whole` as they are, every
/// other one in `parts` parts.
struct Split {
  int whole, parts;

  __device__ Split(int tiles, int steps, int ctas) : whole(tiles / ctas * ctas), parts(1) {
    const int rest = tiles - whole;
    float best = 1;  // time of the last wave, in tiles
    // Past some waves the idle SMs weigh less than the sums.
    for (int n = 2; rest > 0 && whole < 20 * ctas && n <= kMostParts; ++n) {
      if (rest * n > most_parts(ctas)) break;
      const float time = ((rest * n + ctas - 1) / ctas) * (__fdividef(1, n) + __fdividef(kStepsAPart, steps));
      if (time < 0.97f * best) best = time, parts = n;
    }
    if (parts == 1) whole = tiles;
  }
  __device__ int work(int tiles) const { return whole + (tiles - whole) * parts; }
};

}  // namespace flashomni::cuda::sm90
