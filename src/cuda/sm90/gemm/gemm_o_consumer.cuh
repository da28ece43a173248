// GEMM-O's consumers: the sums begin with the bias or with what the Update cached, and go on over the heads.
#pragma once

#include "src/cuda/sm90/gemm/gemm_o.cuh"

namespace flashomni::cuda::sm90 {

template <class Config>
struct OConsumer : GemmConsumer<Config> {
  using Element = typename Config::Element;
  const OParameters& p;

  __device__ OConsumer(typename Config::Shared& shared, const OParameters& p, int id)
      : GemmConsumer<Config>(shared, id, p.sharers), p(p) {}

  __device__ void run() {
    for (;;) {
      const OTile& tile = this->take_tile();
      if (tile.steps[0] == kNoMoreWork) return;
      if (tile.panels == Config::kWide / 64)
        work<Config::kWide>(tile);
      else
        work<Config::kWide / 2>(tile);
      this->release_tile();
    }
  }

  /// A thread has kFeatures / 2 sums of its consumer's 64 rows.
  template <int kFeatures>
  __device__ void work(const OTile& tile) {
    const uint32_t rows = this->id * 64 * Config::kRowBytes;
    float d[kFeatures / 2];
    begin(d, tile);
    if (p.dispatches()) add_cached(d);
    for (int stretch = 0; stretch < 2; ++stretch) {
      this->template multiply<kFeatures, true>(d, tile.steps[stretch], rows, Config::kNarrowBytes);
      if (stretch + tile.stores >= 2) {
        this->wait_turn();
        stage(d);
        this->end_turn();
      }
    }
  }

  template <int kCount>
  __device__ void begin(float (&d)[kCount], const OTile& tile) {
    const bool biased = p.bias != nullptr && tile.order == 0;
    const auto* bias = reinterpret_cast<const uint32_t*>(tile.bias) + ptx_ops::lane_index() % 4;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float2 b = biased ? ptx_ops::unpack<Element>(bias[4 * j]) : float2{0, 0};
      d[4 * j] = d[4 * j + 2] = b.x, d[4 * j + 1] = d[4 * j + 3] = b.y;
    }
  }

  template <int kCount>
  __device__ void add_cached(float (&d)[kCount]) {
    for (int i = 0; i < p.orders; ++i) {
      const float coefficient = this->shared.coefficient[i];
      if (coefficient == 0) continue;  // an order without history may hold anything, and was not loaded
      for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
        this->stages.wait_full(this->shared.stages);
        const int slot = this->stages.slot();
        if (consumer == this->id) add(d, ptx_ops::shared_address(this->shared.stage[slot]), coefficient);
        __syncwarp();
        this->release(slot);
        this->stages.advance();
      }
    }
  }
  template <int kCount>
  __device__ void add(float (&d)[kCount], uint32_t from, float coefficient) {
#pragma unroll
    for (int j = 0; j < kCount / 8; ++j) {
      uint32_t packed[4];
      ptx_ops::ldmatrix_x4(matrix_address(from, j), packed);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 value = ptx_ops::unpack<Element>(packed[i]);
        d[8 * j + 2 * i] += coefficient * value.x, d[8 * j + 2 * i + 1] += coefficient * value.y;
      }
    }
  }

  template <int kCount>
  __device__ void stage(const float (&d)[kCount]) {
    const uint32_t to = ptx_ops::shared_address(this->shared.staging);
#pragma unroll
    for (int j = 0; j < kCount / 8; ++j)
      ptx_ops::stmatrix_x4(matrix_address(to, j), ptx_ops::pack<Element>(d[8 * j], d[8 * j + 1]),
                           ptx_ops::pack<Element>(d[8 * j + 2], d[8 * j + 3]),
                           ptx_ops::pack<Element>(d[8 * j + 4], d[8 * j + 5]),
                           ptx_ops::pack<Element>(d[8 * j + 6], d[8 * j + 7]));
  }

  /// Where this lane's row of the j-th 16 x 16 matrix lies in [4 panels][64 rows][64 columns], swizzled.
  __device__ static uint32_t matrix_address(uint32_t base, int j) {
    const int lane = ptx_ops::lane_index(), row = ptx_ops::thread_index() % 128 / 32 * 16 + lane % 16;
    const int chunk = 2 * j + lane / 16;
    return base + (chunk / 8 * 64 + row) * Config::kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
  }
};

template <class Element>
struct GemmO {
  using Config = GemmConfig<Element, OTile>;
  using Parameters = OParameters;
  using Scheduler = OScheduler<Config>;
  using Loader = OLoader<Config>;
  using Storer = OStorer<Config>;
  using Consumer = OConsumer<Config>;
  __device__ static void prefetch_maps(const OParameters& p) {
    for (const CUtensorMap* map : {&p.o[0], &p.weight, &p.cached[0].map, &p.out.map})
      ptx_ops::prefetch_tensor_map(map);
    if (p.past == 0) return;
    ptx_ops::prefetch_tensor_map(&p.o_past);
    ptx_ops::prefetch_tensor_map(&p.weight_past);
  }
  __device__ static void prepare(typename Config::Shared& shared, const OParameters& p) {
    if (p.dispatches() && static_cast<int>(threadIdx.x) < p.orders)
      shared.coefficient[threadIdx.x] = p.coefficients[threadIdx.x * p.coefficient_stride];
  }
};

}  // namespace flashomni::cuda::sm90
