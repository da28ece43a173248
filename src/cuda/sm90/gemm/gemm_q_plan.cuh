// GEMM-Q's plan, which every block makes for itself: how many active row blocks each list, a (batch element,
// head), has before each band of the sequence. From that a warp finds any tile by its number.
//
// A list's active row blocks in order are items: 256 tokens of two tiles that share the tokens, 512 where they
// share the weight. The order of items: bands of row blocks, of each band the items of all lists that begin in
// it, so that what runs at one time reads the same tokens whatever the pattern; then items of half the width,
// which are short and even out the tail: the last wide ones halved where they would leave SMs idle, and the
// lists' ends.
#pragma once

#include "src/cuda/common/bits.cuh"
#include "src/cuda/ptx/control.cuh"
#include "src/cuda/sm90/gemm/config.cuh"

namespace flashomni::cuda::sm90 {

/// Which items GEMM-Q may have.
struct QProblem {
  Bits cache;
  int batch, heads,
      groups;               // groups: of up to 128 features, a head; or pairs of groups that share the tokens
  int first_block, blocks;  // row blocks of the joint sequence that the matrix touches
  int block_q, row_offset;
  int item_blocks;  // row blocks an item: of the tile, or of both tiles that share the weight
  int band_blocks, bands;

  __host__ __device__ int lists() const { return batch * heads; }
  /// Counts of the table: of each list before each band, and in all.
  __host__ __device__ int counts() const { return (bands + 1) * lists(); }
};

/// Active row blocks [first, last) of a list, by their number, and its group-th features.
struct QItem {
  int list, group, first, last;
};

/// Where a block's table lies: in shared memory where it fits there, else in the workspace.
struct QPlanStorage {
  static constexpr int kBytes = 1280;
  alignas(8) unsigned char bytes[kBytes];

  __host__ __device__ static int64_t needed(const QProblem& p) {
    return (p.bands + 2) * int64_t(sizeof(int)) + (p.counts() * int64_t(sizeof(uint16_t)) + 3) / 4 * 4;
  }
};

class QPlan {
 public:
  __device__ QPlan(const QProblem& p, void* table)
      : p_(p),
        before_band_(static_cast<int*>(table)),
        before_(reinterpret_cast<uint16_t*>(before_band_ + p.bands + 2)) {}

  /// Makes the table: by all `threads` threads of the block, who must meet before they read it.
  __device__ void make(int threads) {
    const int lists = p_.lists();
    for (int i = threadIdx.x; i < p_.counts(); i += threads)
      before_[i] = i < lists ? 0 : active_in(i / lists - 1, i % lists);
    __syncthreads();
    for (int list = threadIdx.x; list < lists; list += threads)
      for (int band = 1; band <= p_.bands; ++band)
        before_[band * lists + list] += before_[(band - 1) * lists + list];
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int band = threadIdx.x / 32; band <= p_.bands; band += threads / 32) {
      int wide = 0, narrow = 0;
      for (int list = lane; list < lists; list += 32) {
        wide += wide_before(list, band);
        narrow += has_narrow(list);
      }
      wide = __reduce_add_sync(ptx_ops::kWholeWarp, wide), narrow = __reduce_add_sync(ptx_ops::kWholeWarp, narrow);
      if (lane == 0) before_band_[band] = wide;
      if (lane == 0 && band == p_.bands) before_band_[band + 1] = narrow;
    }
  }

  /// Of a kernel of `clusters` clusters.
  __device__ int items(int clusters) const {
    return (wide() + narrow()) * p_.groups + halved(clusters);
  }

  /// The item-th one: a warp's lanes together.
  __device__ QItem find(int item, int clusters) const {
    const int halves = halved(clusters), kept = wide() * p_.groups - halves, past = item - kept;
    if (past >= 2 * halves) return find_narrow(past - 2 * halves);
    QItem found = find_wide(past < 0 ? item : kept + past / 2);
    if (past < 0) return found;
    const int middle = found.first + p_.item_blocks / 2;
    (past % 2 == 0 ? found.last : found.first) = middle;
    return found;
  }

  /// Writes the first token, in the matrix, of each of the active row blocks [first, last) of a list to row[0..]: a
  /// warp's lanes together.
  __device__ void write_rows(int list, int first, int last, int* row) const {
    if (first >= last) return;
    const int lane = ptx_ops::lane_index(), batch = list / p_.heads, head = list - batch * p_.heads;
    const int band = first_of(p_.bands, [&](int b) { return before(b + 1, list) > first; });
    int number = before(band, list);
    for (int begin = band * p_.band_blocks; begin < p_.blocks && number < last; begin += 32) {
      const int block = p_.first_block + begin + lane;
      const bool active = begin + lane < p_.blocks && p_.cache.bit(batch, int64_t(block) * p_.heads + head);
      const uint32_t ballot = __ballot_sync(ptx_ops::kWholeWarp, active);
      const int mine = number + __popc(ballot & low_bits(lane));
      if (active && mine >= first && mine < last) row[mine - first] = block * p_.block_q - p_.row_offset;
      number += __popc(ballot);
    }
  }

 private:
  const QProblem& p_;
  int* const before_band_;  // [bands + 1] wide items a group that begin before a band; then narrow ones
  uint16_t* const before_;  // [bands + 1, lists] active row blocks

  __device__ int before(int band, int list) const { return before_[band * p_.lists() + list]; }
  __device__ int wide() const { return before_band_[p_.bands]; }
  __device__ int narrow() const { return before_band_[p_.bands + 1]; }

  __device__ int active_in(int band, int list) const {
    const int begin = band * p_.band_blocks, end = min(begin + p_.band_blocks, p_.blocks);
    const int batch = list / p_.heads;
    int64_t bit = int64_t(p_.first_block + begin) * p_.heads + (list - batch * p_.heads);
    if (p_.cache.bytes == nullptr) return end - begin;
    // From the byte of the element's first bit on, so that the offsets are read once.
    const uint8_t* bytes = p_.cache.byte(batch, 0);
    int active = 0;
#pragma unroll 8
    for (int block = begin; block < end; ++block, bit += p_.heads) active += bytes[bit >> 3] >> (bit & 7) & 1;
    return active;
  }

  // A list's last row blocks make a wide item where they are more than half of one, else a narrow one.
  __device__ int wide_of(int list) const {
    const int active = before(p_.bands, list), full = p_.item_blocks;
    return active / full + (2 * (active % full) > full);
  }
  __device__ bool has_narrow(int list) const {
    const int rest = before(p_.bands, list) % p_.item_blocks;
    return rest > 0 && 2 * rest <= p_.item_blocks;
  }
  /// Wide items of a list that begin before a band.
  __device__ int wide_before(int list, int band) const {
    return min((before(band, list) + p_.item_blocks - 1) / p_.item_blocks, wide_of(list));
  }
  /// Wide items to halve: those left over from whole rounds (all clusters busy), where their halves fit one
  /// round of half the length.
  __device__ int halved(int clusters) const {
    const int rest = wide() * p_.groups % clusters;
    return 2 * rest + narrow() * p_.groups <= clusters ? rest : 0;
  }

  /// The first of [0, count) that `is`, of which there is one: a warp's lanes together.
  template <class Is>
  __device__ static int first_of(int count, Is is) {
    for (int begin = 0;; begin += 32) {
      const int i = begin + ptx_ops::lane_index();
      const uint32_t ballot = __ballot_sync(ptx_ops::kWholeWarp, i < count && is(i));
      if (ballot != 0 || begin + 32 >= count) return begin + __ffs(ballot) - 1;
    }
  }

  struct Place {
    int list, before;  // before: of all that `count` counts, those of earlier lists
  };
  /// The list in which the at-th of what `count` counts lies: a warp's lanes together.
  template <class Count>
  __device__ Place list_of(int at, Count count) const {
    const int lane = ptx_ops::lane_index();
    int before = 0;
    for (int begin = 0;; begin += 32) {
      const int list = begin + lane, own = list < p_.lists() ? count(list) : 0;
      int until = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(ptx_ops::kWholeWarp, until, step);
        if (lane >= step) until += below;
      }
      const uint32_t ballot = __ballot_sync(ptx_ops::kWholeWarp, before + until > at);
      if (ballot != 0 || begin + 32 >= p_.lists()) {
        const int there = (__ffs(ballot) - 1) & 31;
        return {begin + there, before + __shfl_sync(ptx_ops::kWholeWarp, until - own, there)};
      }
      before += __shfl_sync(ptx_ops::kWholeWarp, until, 31);
    }
  }

  __device__ QItem find_wide(int at) const {
    const int band = first_of(p_.bands, [&](int b) { return before_band_[b + 1] * p_.groups > at; });
    at -= before_band_[band] * p_.groups;
    const auto begun = [&](int list) { return wide_before(list, band + 1) - wide_before(list, band); };
    const Place place = list_of(at, [&](int list) { return begun(list) * p_.groups; });
    const int tiles = begun(place.list), group = (at - place.before) / tiles, tile = (at - place.before) % tiles;
    const int first = (wide_before(place.list, band) + tile) * p_.item_blocks;
    return {place.list, group, first, min(first + p_.item_blocks, before(p_.bands, place.list))};
  }
  __device__ QItem find_narrow(int at) const {
    const int list = list_of(at / p_.groups, [&](int l) { return int(has_narrow(l)); }).list;
    return {list, at % p_.groups, wide_of(list) * p_.item_blocks, before(p_.bands, list)};
  }
};

}  // namespace flashomni::cuda::sm90
