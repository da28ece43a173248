// GEMM-Q's consumers: products of 64 features and up to 256 tokens, and the epilogue.
#pragma once

#include "src/cuda/sm90/gemm/gemm_q.cuh"

namespace flashomni::cuda::sm90 {

__device__ inline float gelu(float x) {
  return 0.5f * x * (1 + erff(x * 0.70710678f));
}
/// x / (1 + 2^(-2 log2(e) sqrt(2 / pi) (x + 0.044715 x^3)))
__device__ inline float gelu_tanh(float x) {
  const float inner = x * (x * x * 0.044715f + 1) * -2.30220820f;
  return x * ptx_ops::reciprocal_approx(1 + ptx_ops::exp2_approx(inner));
}

template <class Config>
struct QConsumer : GemmConsumer<Config> {
  using Element = typename Config::Element;
  const QParameters& p;

  __device__ QConsumer(typename Config::Shared& shared, const QParameters& p, int id)
      : GemmConsumer<Config>(shared, id, p.sharers), p(p) {}

  __device__ void run() {
    for (;;) {
      const QTile& tile = this->take_tile();
      if (tile.steps == kNoMoreWork) return;
      // Two panels of features: one each. One: both multiply it, each with half of the tokens.
      const uint32_t features = tile.one_panel ? 0 : this->id * 64 * Config::kRowBytes;
      const uint32_t tokens =
          Config::kNarrowBytes + (tile.one_panel ? this->id * 128 * Config::kRowBytes : 0);
      if (tile.blocks == 0)
        pass(tile.steps);
      else if (tile.wide && !tile.one_panel)
        work<256>(tile, features, tokens);
      else
        work<128>(tile, features, tokens);
      this->release_tile();
    }
  }

  /// A list's end can leave nothing for rank 1: what it shares passes by.
  __device__ void pass(int steps) {
    for (int k = 0; k < steps; ++k) this->skip(this->take_stage());
    this->wait_turn();
    this->end_turn();
  }

  template <int kTokens>
  __device__ void work(const QTile& tile, uint32_t features, uint32_t tokens) {
    float d[kTokens / 2];
    begin(d, tile);
    this->template multiply<kTokens, false>(d, tile.steps, features, tokens);
    activate(d);
    this->wait_turn();
    stage(d);
    this->end_turn();
  }

  /// With the bias. A thread's registers hold two features: of every four values two are of feature `row`,
  /// two of `row` + 8.
  template <int kCount>
  __device__ void begin(float (&d)[kCount], const QTile& tile) {
    const bool biased = p.bias != nullptr;
    const int thread = ptx_ops::thread_index() % 128;
    const int row = (tile.one_panel ? 0 : 64 * this->id) + thread / 32 * 16 + thread % 32 / 4;
    const auto* bias = reinterpret_cast<const Element*>(tile.bias) + row;
    const float low = biased ? float(bias[0]) : 0, high = biased ? float(bias[8]) : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) d[i] = i % 4 < 2 ? low : high;
  }

  template <int kCount>
  __device__ void activate(float (&d)[kCount]) {
    if (p.activation == Activation::kGeluTanh) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] = gelu_tanh(d[i]);
    } else if (p.activation == Activation::kGelu) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] = gelu(d[i]);
    }
  }

  /// Transposed: [tokens][64 features], swizzled as the copy engine reads it.
  template <int kCount>
  __device__ void stage(const float (&d)[kCount]) {
    const int thread = ptx_ops::thread_index() % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t row = ptx_ops::shared_address(this->shared.staging) +
                         (lane / 16 * 8 + lane % 8) * Config::kRowBytes +
                         ((2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int j = 0; j < kCount / 8; ++j)
      ptx_ops::stmatrix_x4_transposed(row + j * 16 * Config::kRowBytes,
                                      ptx_ops::pack<Element>(d[8 * j], d[8 * j + 1]),
                                      ptx_ops::pack<Element>(d[8 * j + 2], d[8 * j + 3]),
                                      ptx_ops::pack<Element>(d[8 * j + 4], d[8 * j + 5]),
                                      ptx_ops::pack<Element>(d[8 * j + 6], d[8 * j + 7]));
  }
};

template <class Element>
struct GemmQ {
  using Config = GemmConfig<Element, QTile, QPlanStorage>;
  using Parameters = QParameters;
  using Scheduler = QScheduler<Config>;
  using Loader = QLoader<Config>;
  using Storer = QStorer<Config>;
  using Consumer = QConsumer<Config>;
  __device__ static void prefetch_maps(const QParameters& p) {
    for (const CUtensorMap* map : {&p.x, &p.weight, &p.out.map}) ptx_ops::prefetch_tensor_map(map);
  }
  __device__ static void prepare(typename Config::Shared& shared, const QParameters& p) {
    plan_of<Config>(shared, p).make(Config::kThreads);
  }
};

}  // namespace flashomni::cuda::sm90
