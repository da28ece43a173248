// A consumer warpgroup: 64 query rows, S = Q K^T, softmax, O += P V. The scores of step n are issued before
// the product P V of step n - 1, and the softmax of n runs under that product; this holds across tiles too, so
// that a tile's epilogue costs only its own arithmetic. Consumers know nothing of sparsity: a tile is a number
// of steps, of which the first few come with a mask.
#pragma once

#include "src/cuda/ptx/wgmma.cuh"
#include "src/cuda/sm90/attention/config.cuh"
#include "src/cuda/sm90/attention/softmax.cuh"

namespace flashomni::cuda::sm90 {

template <class Config>
struct Consumer {
  using Element = typename Config::Element;
  using Shared = typename Config::Shared;
  static constexpr int kHeadDim = Config::kHeadDim, kStep = Config::kStep;
  static constexpr int kQueryChunks = kHeadDim / 16, kKeyChunks = kStep / 16;  // of 16, what one wgmma reduces
  static constexpr uint32_t kQueryPanel = Config::kConsumerRows * 128, kKvPanel = kStep * 128;
  static constexpr bool kTakesTurns = Config::kConsumers == 2;

  Shared& shared;
  const AttentionParameters& p;
  const int index;
  const bool leader;  // of the warp

  int taken = 0;  // tiles: the place in two rings at once, tiles and queries
  RingCursor<Config::kRingSlots> blocks;  // in the order K0 K1 V0 K2 V1 ...: every product takes the next one
  RingCursor<Config::kMaskSlots> masks;

  float scores[kStep / 2], output[kHeadDim / 2];
  using Fragments = uint32_t[kKeyChunks][4];
  Fragments even, odd;  // probabilities of this step and of the one before, whose product may still read them
  LazySoftmax<Element> softmax;

  __device__ Consumer(Shared& shared, const AttentionParameters& p, int index)
      : shared(shared), p(p), index(index), leader(threadIdx.x % 32 == 0) {
    if (index == 1) pass_turn();
  }
  // At head_dim 256 there is no room to keep what the compiler would compute from it once.
  __device__ int id() const {
    if constexpr (Config::kConsumers == 1) return 0;
    return kHeadDim == 256 ? ptx_ops::opaque(index) : index;
  }

  // ---- turns at the tensor cores ----
  __device__ void wait_turn() {
    if constexpr (kTakesTurns) ptx_ops::named_barrier_sync(kTurnOfConsumer0 + id(), 256);
  }
  __device__ void pass_turn() {
    if constexpr (kTakesTurns) ptx_ops::named_barrier_arrive(kTurnOfConsumer0 + (id() ^ 1), 256);
  }

  // ---- tiles ----
  // Nothing of a tile is kept in registers: what is asked of it is read again, by its place before the cursor.
  __device__ void take_tile() {
    wait_next_tile();
    ++taken;
  }
  __device__ void wait_next_tile() { RingCursor<Config::kTileSlots>(taken).wait_full(shared.tiles); }
  __device__ void wait_query() { RingCursor<Config::kQuerySlots>(taken - 1).wait(shared.queries); }
  // Of the current tile, or the one `back` before it.
  __device__ int tile_slot(int back = 0) const { return RingCursor<Config::kTileSlots>(taken - 1 - back).slot(); }
  __device__ int query_slot(int back = 0) const { return RingCursor<Config::kQuerySlots>(taken - 1 - back).slot(); }
  __device__ const Tile& current() const { return shared.tile[tile_slot()]; }
  __device__ static int whole_steps(const Tile& tile) { return tile.steps - tile.masked; }
  /// The first of this thread's two rows; the other is 8 below.
  __device__ int tile_row() const {
    const int thread = ptx_ops::thread_index() % 128;
    return id() * Config::kConsumerRows + thread / 32 * 16 + thread % 32 / 4;
  }

  // Address of this lane's 16-byte row in the 16x16 matrix at (16 warp, 16 chunk) of a query or output buffer.
  __device__ uint32_t matrix_address(int slot, int chunk) const {
    const int thread = ptx_ops::thread_index() % 128, lane = thread % 32;
    const int row = thread / 32 * 16 + lane % 16, column = 2 * chunk + lane / 16;
    return ptx_ops::shared_address(shared.query[slot][id()]) + column / 8 * kQueryPanel + row * 128 +
           ((column % 8) ^ (row % 8)) * 16;
  }

  // ---- products: each takes the next block of the ring and returns its slot, to be released when done ----
  __device__ int issue_scores() {
    blocks.wait_full(shared.blocks);
    const uint32_t q =
        ptx_ops::descriptor_reduction_major(ptx_ops::shared_address(shared.query[query_slot()][id()]));
    const uint32_t k =
        ptx_ops::descriptor_reduction_major(ptx_ops::shared_address(shared.ring[blocks.slot()]));
    wait_turn();
    ptx_ops::wgmma_fence();
#pragma unroll
    for (int c = 0; c < kQueryChunks; ++c)
      ptx_ops::Wgmma<Element, kStep, ptx_ops::Major::kReduction>::ss(
          scores, ptx_ops::descriptor(q + ((c / 4 * kQueryPanel + c % 4 * 32) >> 4)),
          ptx_ops::descriptor(k + ((c / 4 * kKvPanel + c % 4 * 32) >> 4)), c > 0);
    ptx_ops::wgmma_commit();
    return next_slot();
  }

  __device__ int issue_output(const Fragments& probabilities, bool accumulate) {
    blocks.wait_full(shared.blocks);
    const uint32_t v =
        ptx_ops::descriptor_mn_major(ptx_ops::shared_address(shared.ring[blocks.slot()]), kKvPanel);
    ptx_ops::wgmma_fence();
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c)
      ptx_ops::Wgmma<Element, kHeadDim, ptx_ops::Major::kMN>::rs(
          output, probabilities[c], ptx_ops::descriptor(v + (c * 16 * 128 >> 4)), c > 0 || accumulate);
    ptx_ops::wgmma_commit();
    return next_slot();
  }

  __device__ int next_slot() {
    const int slot = blocks.slot();
    blocks.advance();
    return slot;
  }
  __device__ void release(int slot) {
    if (leader) ptx_ops::arrive(shared.blocks.empty[slot]);
  }
  template <int kPending>
  __device__ void scores_ready(int slot) {
    ptx_ops::wgmma_wait<kPending>();
    ptx_ops::pin(scores);
    release(slot);
  }
  __device__ void output_ready(int slot) {
    ptx_ops::wgmma_wait<0>();
    ptx_ops::pin(output);
    release(slot);
  }

  // ---- epilogue ----
  __device__ void write_lse(const Tile& tile) {
    if (p.lse == nullptr || ptx_ops::lane_index() % 4 != 0) return;
    float* lse = p.lse + tile.batch * p.lse_batch_stride + tile.head * p.lse_head_stride;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row() + 8 * r;
      if (row < tile.rows)
        lse[(tile.q_row + row) * p.lse_token_stride] =
            softmax.row_sum[r] == 0 ? -INFINITY : softmax.shift[r] + log2f(softmax.row_sum[r]);
    }
  }

  // What the output's rows are multiplied by.
  struct Inverse {
    float of[2];
  };
  // Ends a tile's softmax. Its last product may still be in flight.
  __device__ Inverse close(const Tile& tile) {
    softmax.finish();
    write_lse(tile);
    return {inverse_sum(0), inverse_sum(1)};
  }
  __device__ float inverse_sum(int r) const {
    return softmax.row_sum[r] == 0 ? 0 : ptx_ops::reciprocal_approx(softmax.row_sum[r]);
  }

  // The output goes to the query buffer of its tile, which only this warpgroup reads and no longer needs. The
  // accumulators are left as they are: scaled in place while a product is in flight, they would make ptxas
  // serialise it (C7513).
  __device__ void write_output(int back, const Inverse& inverse) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed[i] = ptx_ops::pack<Element>(output[8 * k + 2 * i] * inverse.of[i % 2],
                                           output[8 * k + 2 * i + 1] * inverse.of[i % 2]);
      ptx_ops::stmatrix_x4(matrix_address(query_slot(back), k), packed[0], packed[1], packed[2], packed[3]);
    }
    output_staged(back);
  }
  __device__ void finish_empty() {
    softmax.shift[0] = softmax.shift[1] = -INFINITY;
    softmax.row_sum[0] = softmax.row_sum[1] = 0;
    if (current().parts > 1) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) output[i] = 0;
      finish_part();
      return;
    }
    write_lse(current());
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) ptx_ops::stmatrix_x4(matrix_address(query_slot(), k), 0, 0, 0, 0);
    output_staged(0);
  }

  // Leaves this part's sums in the workspace, a float4 of every thread side by side; the last warp to come adds
  // the parts up and writes the rows.
  __device__ void finish_part() {
    constexpr int kVectors = kHeadDim / 8;  // float4 of output a thread; one more holds shifts and row sums
    const Tile& tile = current();
    const int parts = tile.parts, thread = ptx_ops::thread_index() % 128, warp = thread / 32;
    const auto vectors_of = [&](int part) {
      return p.parts + (int64_t(tile.split * parts + part) * Config::kConsumers + id()) * (kVectors + 1) * 128 + thread;
    };
    softmax.finish();
    float4* mine = vectors_of(tile.part);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      mine[i * 128] = {output[4 * i], output[4 * i + 1], output[4 * i + 2], output[4 * i + 3]};
    mine[kVectors * 128] = {softmax.shift[0], softmax.shift[1], softmax.row_sum[0], softmax.row_sum[1]};
    __threadfence();
    __syncwarp();
    int arrived = 0;
    if (leader) arrived = atomicAdd(&p.arrivals[tile.split * Config::kConsumerWarps + 4 * id() + warp], 1);
    arrived = __shfl_sync(ptx_ops::kWholeWarp, arrived, 0);
    if (arrived == parts - 1) {
      __threadfence();
      add_parts(parts, vectors_of);
      write_lse(tile);
      write_rows(tile);
    }
    output_staged(0);
  }
  template <class Vectors>
  __device__ void add_parts(int parts, Vectors vectors_of) {
    constexpr int kVectors = kHeadDim / 8;
    float top[2] = {-INFINITY, -INFINITY};
    for (int i = 0; i < parts; ++i) {
      const float4 state = __ldcg(vectors_of(i) + kVectors * 128);
      top[0] = fmaxf(top[0], state.x), top[1] = fmaxf(top[1], state.y);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output[i] = 0;
    softmax.row_sum[0] = softmax.row_sum[1] = 0;
    for (int i = 0; i < parts; ++i) {
      const float4* vectors = vectors_of(i);
      const float4 state = __ldcg(vectors + kVectors * 128);
      const float factor[2] = {state.x == -INFINITY ? 0 : ptx_ops::exp2_approx(state.x - top[0]),
                               state.y == -INFINITY ? 0 : ptx_ops::exp2_approx(state.y - top[1])};
      softmax.row_sum[0] += factor[0] * state.z, softmax.row_sum[1] += factor[1] * state.w;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const float4 v = __ldcg(vectors + j * 128);
        output[4 * j] += factor[0] * v.x, output[4 * j + 1] += factor[0] * v.y;
        output[4 * j + 2] += factor[1] * v.z, output[4 * j + 3] += factor[1] * v.w;
      }
    }
    softmax.shift[0] = top[0], softmax.shift[1] = top[1];
  }
  __device__ void write_rows(const Tile& tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row() + 8 * r, quad = ptx_ops::lane_index() % 4;
      if (row >= tile.rows) continue;
      const float inverse = inverse_sum(r);
      const int64_t at = (tile.q_row + row) * p.out_token_stride + tile.head * p.out_head_stride +
                         (p.problem.q_indptr != nullptr ? 0 : tile.batch * p.out_batch_stride);
      auto* out = reinterpret_cast<Element*>(p.out_data) + at;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const int column = 8 * i + 2 * quad;
        if (column < p.head_dim)
          *reinterpret_cast<uint32_t*>(out + column) =
              ptx_ops::pack<Element>(output[4 * i + 2 * r] * inverse, output[4 * i + 2 * r + 1] * inverse);
      }
    }
  }
  __device__ void output_staged(int back) {
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx_ops::named_barrier_arrive(kOutputStaged0 + query_slot(back), Config::kStoreThreads);
    if (leader) ptx_ops::arrive(shared.tiles.empty[tile_slot(back)]);
  }

  // ---- softmax ----
  /// The mask's terms for this lane's columns: of each eight, two.
  struct Terms {
    const float* first;
    __device__ float2 operator()(int eight) const { return *reinterpret_cast<const float2*>(first + 8 * eight); }
  };
  __device__ Terms take_mask() {
    masks.wait_full(shared.masks);
    const auto& mask = shared.mask[masks.slot()];
    const int first = 2 * (ptx_ops::lane_index() % 4);
    if (p.problem.causal) hide_later_keys(mask.limit, first);
    return {&mask.term[first]};
  }
  __device__ void release_mask() {
    __syncwarp();
    ptx_ops::arrive(shared.masks.empty[masks.slot()]);
    masks.advance();
  }
  __device__ void hide_later_keys(const int (&limit)[2], int first) {
    const int row = tile_row() - first;
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) {
      const int column = 8 * (i / 4) + i % 2;
      if (column % 64 > limit[column / 64] + row + 8 * (i % 4 / 2)) scores[i] = -INFINITY;
    }
  }
  /// Where the maximum is wanted, which is of scores with the mask in them.
  __device__ void add_to_scores(const Terms& terms) {
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) {
      const float2 pair = terms(i / 4);
      scores[i] = fmaf(i % 2 == 0 ? pair.x : pair.y, p.inverse_scale_log2, scores[i]);
    }
  }
  __device__ void mask_scores() {
    add_to_scores(take_mask());
    release_mask();
  }

  template <bool kMaybeMasked>
  __device__ void first_softmax(bool masked, Fragments& probabilities) {
    if (kMaybeMasked && masked) mask_scores();
    softmax.start(scores, p.scale_log2);
    const auto sums = softmax.template exponentiate<kMaybeMasked>(scores, p.scale_log2, probabilities);
    sums.complete_here();
    softmax.accept(sums);
  }

  // ---- the loop ----
  // Step n: its scores, its probabilities into `next`, and the product of step n - 1, whose probabilities are
  // `last`. A row that has seen a key before needs no other care with a mask: its shift is finite, and a sum that
  // a summary's weight makes too large is raised like any other.
  template <bool kMasked>
  __device__ void step(const Fragments& last, Fragments& next, bool accumulate) {
    const int k_slot = issue_scores(), v_slot = issue_output(last, accumulate);
    pass_turn();
    finish_step<kMasked>(next, k_slot, v_slot);
  }
  // A tile's second step, while whose scores are computed the tile before is finished: its output makes room.
  template <class Finish>
  __device__ void second_step(const Fragments& last, Fragments& next, Finish finish_tile_before) {
    const int k_slot = issue_scores();
    pass_turn();
    finish_tile_before();
    const int v_slot = issue_output(last, false);
    finish_step<false>(next, k_slot, v_slot);
  }
  template <bool kMasked>
  __device__ auto exponentiate(const Terms& terms, Fragments& next) {
    if constexpr (kMasked) return softmax.template exponentiate<false>(scores, p.scale_log2, next, terms);
    return softmax.template exponentiate<false>(scores, p.scale_log2, next);
  }
  template <bool kMasked>
  __device__ void finish_step(Fragments& next, int k_slot, int v_slot) {
    scores_ready<1>(k_slot);
    [[maybe_unused]] Terms terms{};
    if constexpr (kMasked) terms = take_mask();
    auto sums = exponentiate<kMasked>(terms, next);
    // This branch also keeps ptxas from hoisting the wait below above the exponentials.
    if (sums.outgrown()) [[unlikely]] {
      ptx_ops::wgmma_wait<0>();
      ptx_ops::pin(output);
      if constexpr (kMasked) add_to_scores(terms);
      float factor[2];
      softmax.raise(scores, p.scale_log2, factor);
      scale_rows(output, factor);
      sums = softmax.template exponentiate<false>(scores, p.scale_log2, next);
    }
    if constexpr (kMasked) release_mask();
    softmax.accept(sums);
    ptx_ops::pin(next);
    output_ready(v_slot);
  }

  // A step of a tile that has no whole block: rows may have seen nothing so far, so the maximum is always
  // taken. Nothing overlaps.
  __device__ void careful_step(Fragments& probabilities, bool accumulate) {
    const int k_slot = issue_scores(), v_slot = issue_output(probabilities, accumulate);
    pass_turn();
    ptx_ops::wgmma_wait<0>();
    ptx_ops::pin(scores);
    ptx_ops::pin(output);
    release(k_slot);
    release(v_slot);
    mask_scores();
    float factor[2];
    softmax.raise(scores, p.scale_log2, factor);
    scale_rows(output, factor);
    softmax.accept(softmax.template exponentiate<true>(scores, p.scale_log2, probabilities));
    ptx_ops::pin(probabilities);
  }

  // The steps from n on of the current tile, whose probabilities so far lie in `even`, where they lie afterwards.
  __device__ void remaining_steps(int n) {
    const int steps = current().steps, whole = whole_steps(current());
    if (whole == 0) {
      for (; n < steps; ++n) careful_step(even, n > 1);
      return;
    }
    // Left in the middle, too: of an odd number, a copy of the step would be fetched anew by every short tile.
    for (; n < whole; n += 2) {
      step<false>(even, odd, n > 1);
      if (n + 1 == whole) {
        ptx_ops::move_registers(even, odd);
        ++n;
        break;
      }
      step<false>(odd, even, true);
    }
    for (; n < steps; ++n) {
      step<true>(even, odd, n > 1);
      ptx_ops::move_registers(even, odd);
    }
  }

  // As the one step of a tile of nothing leaves it.
  __device__ void begin_with_nothing() {
    softmax.row_sum[0] = softmax.row_sum[1] = 0;
#pragma unroll
    for (int i = 0; i < kKeyChunks; ++i) even[i][0] = even[i][1] = even[i][2] = even[i][3] = 0;
  }
  // The current tile's first step, with nothing beside it.
  __device__ void begin() {
    const int slot = issue_scores();
    pass_turn();
    scores_ready<0>(slot);
    first_softmax<true>(whole_steps(current()) == 0, even);
  }
  // The last product and the end of the current tile, with nothing beside them.
  __device__ void finish_alone() {
    wait_turn();
    const int v_slot = issue_output(even, current().steps > 1);
    pass_turn();
    output_ready(v_slot);
    if (current().parts > 1)
      finish_part();
    else
      write_output(0, close(current()));
  }
  // Whether the tile after the current one, already published, may begin under the current one's end.
  __device__ bool next_overlaps() const {
    const Tile& next = shared.tile[tile_slot(-1)];
    return Config::kOverlapsTiles && current().parts == 1 && whole_steps(next) > 0;
  }

  __device__ void run() {
    if constexpr (Config::kBeginsBetween) begin_with_nothing();
    for (take_tile(); current().steps != kNoMoreTiles; take_tile()) {
      wait_query();
      if (current().steps == 0) {
        finish_empty();
        continue;
      }
      if (!Config::kBeginsBetween || taken > 1) begin();

      for (int n = 1;;) {
        remaining_steps(n);
        wait_next_tile();
        if (!next_overlaps()) {
          finish_alone();
          break;
        }
        // The next tile's first step runs with this tile's last product, and this tile's epilogue under the
        // scores of the next tile's second step.
        const bool accumulate = current().steps > 1;
        ++taken;
        wait_query();
        const int k_slot = issue_scores(), v_slot = issue_output(even, accumulate);
        pass_turn();
        const Inverse inverse = close(shared.tile[tile_slot(1)]);
        scores_ready<1>(k_slot);
        first_softmax<false>(false, odd);
        output_ready(v_slot);
        const auto write = [&] { write_output(1, inverse); };
        if (whole_steps(current()) == 1) {
          write();
          ptx_ops::move_registers(even, odd);
          n = 1;
        } else {
          second_step(odd, even, write);
          n = 2;
        }
      }
    }
    if (index == 0) wait_turn();  // takes the other warpgroup's last pass
  }
};

}  // namespace flashomni::cuda::sm90
