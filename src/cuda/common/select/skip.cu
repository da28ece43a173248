// Scores of the block means, and in each row the KV blocks with the smallest softmax mass, up to tau_kv.
//
// A warp takes four rows of one head. For the scores, its lanes are columns; for the rest, eight lanes work on a
// row, so that one ballot makes a byte of each row's bits. Scores stay in float32 without tensor cores: the
// choice must be that of the CPU but for rounding, and they cost little.
#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "src/cuda/common/chain.cuh"
#include "src/cuda/common/select/problem.cuh"

namespace flashomni::cuda {
namespace {

constexpr int kRowsAWarp = 4, kLanesARow = 32 / kRowsAWarp;
constexpr int kMostWarps = 4;
constexpr int kColumns = 32;  // keys in shared memory at a time
constexpr int kFewColumns = 8 * kLanesARow;

/// Floats of a key there: rows four apart start in banks of their own, for reads of 16 bytes a lane.
__host__ __device__ constexpr int key_stride(int dim) {
  return dim + 4;
}
/// Floats of a row of scores: 8 modulo 32, so that a warp's four rows lie in banks of their own.
__host__ __device__ constexpr int score_stride(int kv_blocks) {
  return (kv_blocks + 23) / 32 * 32 + 8;
}

struct Shared {
  float *keys, *queries, *scores;

  __device__ Shared(float* memory, const SelectProblem& p, int rows)
      : keys(memory), queries(keys + kColumns * key_stride(p.dim)), scores(queries + rows * p.dim) {}
};

/// Has rows [first, first + count) of `means` copied into shared memory, zeros past `blocks`. A warp a row; dim is
/// a multiple of 4.
__device__ void copy_means(const float* means, int64_t stride, int first, int count, int blocks, int dim, float* to,
                           int to_stride) {
  const bool aligned = stride % 4 == 0 && reinterpret_cast<uintptr_t>(means) % 16 == 0;
  for (int row = threadIdx.x / 32; row < count; row += blockDim.x / 32) {
    const bool exists = first + row < blocks;
    const float* from = means + (exists ? first + row : 0) * stride;
    for (int d = threadIdx.x % 32 * 4; d < dim; d += 128) {
      float* place = to + row * to_stride + d;
      if (aligned) {
        __pipeline_memcpy_async(place, from + d, 16, exists ? 0 : 16);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) __pipeline_memcpy_async(place + i, from + d + i, 4, exists ? 0 : 4);
      }
    }
  }
}

/// Scores of this warp's rows with the keys in shared memory; a lane a key.
__device__ void multiply(const SelectProblem& p, const Shared& shared, int first_column) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float4* key = reinterpret_cast<const float4*>(shared.keys + lane * key_stride(p.dim));
  const float4* query = reinterpret_cast<const float4*>(shared.queries + warp * kRowsAWarp * p.dim);
  float sum[kRowsAWarp] = {};
#pragma unroll 8
  for (int d = 0; d < p.dim / 4; ++d) {
    const float4 k = key[d];
#pragma unroll
    for (int r = 0; r < kRowsAWarp; ++r) {
      const float4 q = query[r * (p.dim / 4) + d];
      sum[r] += q.x * k.x;
      sum[r] += q.y * k.y;
      sum[r] += q.z * k.z;
      sum[r] += q.w * k.w;
    }
  }
  if (first_column + lane >= p.kv_blocks) return;
#pragma unroll
  for (int r = 0; r < kRowsAWarp; ++r)
    shared.scores[(warp * kRowsAWarp + r) * score_stride(p.kv_blocks) + first_column + lane] = p.scale * sum[r];
}

/// One row of scores as eight lanes see it; `lane` is this one's number among them.
struct Row {
  float* x;
  int n, lane;

  template <class F>
  __device__ void each(F&& f) const {
    for (int j = lane; j < n; j += kLanesARow) f(j, x[j]);
  }
  /// In place. False (all zero) if no score is finite.
  __device__ bool softmax() const {
    float peak = -INFINITY;
    each([&](int, float score) { peak = fmaxf(peak, finite_or_lowest(score)); });
    peak = maximum<kLanesARow>(peak);
    const bool any = peak > -INFINITY;
    double sum = 0;
    each([&](int j, float score) {
      const float weight = any ? expf(finite_or_lowest(score) - peak) : 0.0f;
      x[j] = weight;
      sum += weight;
    });
    sum = total<kLanesARow>(sum);
    const double inverse = any ? 1.0 / sum : 0.0;
    each([&](int j, float weight) { x[j] = static_cast<float>(weight * inverse); });
    return any;
  }
  /// Bit b: whether the weights up to this lane's b-th, in the order of (weight, index) and itself included, add up
  /// to at most `limit`; weights above 1 never do. Of a row of at most kFewColumns.
  __device__ unsigned lightest(double limit) const {
    constexpr int kOwn = kFewColumns / kLanesARow;
    float own[kOwn];
    double mass[kOwn] = {};
#pragma unroll
    for (int b = 0; b < kOwn; ++b) own[b] = lane + b * kLanesARow < n ? x[lane + b * kLanesARow] : INFINITY;
#pragma unroll 2
    for (int i = 0; i < n; ++i) {
      const float weight = x[i];
      const double added = weight;
#pragma unroll
      for (int b = 0; b < kOwn; ++b)
        if (weight < own[b] || (weight == own[b] && i <= lane + b * kLanesARow)) mass[b] += added;
    }
    unsigned bits = 0;
#pragma unroll
    for (int b = 0; b < kOwn; ++b) bits |= unsigned{own[b] <= 1 && mass[b] <= limit} << b;
    return bits;
  }
  /// The last of the heaviest.
  __device__ int heaviest() const {
    float most = -1;
    int at = -1;
    each([&](int j, float weight) {
      if (weight >= most) most = weight, at = j;
    });
    const float peak = maximum<kLanesARow>(most);
    return reduce<kLanesARow>(most == peak ? at : -1, [](int a, int b) { return max(a, b); });
  }
};

/// The smallest weights whose sum is at most `limit`: all up to `most`, and the first `ties` of those equal to
/// `next`, in the order of their index.
struct Prefix {
  float most = 0, next = INFINITY;
  int ties = 0;

  Prefix() = default;
  /// Weights from 0 to 1 take part; larger ones never do.
  __device__ Prefix(const Row& row, double limit) {
    // Two bits at a time: floats that are not negative are ordered as their bits are. 30 bits: below 2.
    uint32_t bits = 0;
    double mass = 0;
    for (int shift = 28; shift >= 0; shift -= 2) {
      double sums[3] = {};
      row.each([&](int, float weight) {
#pragma unroll
        for (uint32_t digit = 1; digit <= 3; ++digit)
          if (weight <= __uint_as_float(bits | digit << shift)) sums[digit - 1] += weight;
      });
      uint32_t most_digit = 0;
#pragma unroll
      for (uint32_t digit = 1; digit <= 3; ++digit) {
        const double sum = total<kLanesARow>(sums[digit - 1]);
        if (sum <= limit) most_digit = digit, mass = sum;
      }
      bits |= most_digit << shift;
    }
    most = __uint_as_float(bits);
    row.each([&](int, float weight) {
      if (weight > most) next = fminf(next, weight);
    });
    next = -maximum<kLanesARow>(-next);
    if (next > 1) return;
    ties = static_cast<int>(fmin((limit - mass) / next, static_cast<double>(row.n)));
    while (ties > 0 && mass + ties * static_cast<double>(next) > limit) --ties;
    while (ties < row.n && mass + (ties + 1) * static_cast<double>(next) <= limit) ++ties;
  }
};

constexpr float kNeverChosen = 2;

/// Writes which KV blocks each of the warp's rows keeps. `kept`: where this row's bytes go.
__device__ void choose(const SelectProblem& p, const Row& row, int batch, int head, float tau, bool whole, bool writes,
                       uint8_t* kept) {
  const int heaviest = p.text_kv() == 0 ? row.heaviest() : -1;  // a row keeps a block
  row.each([&](int j, float) {
    if (p.is_text_kv(j) || j == heaviest || p.is_guarded(batch, head, j)) row.x[j] = kNeverChosen;
  });
  // A search by bits takes some microseconds however short the row is.
  const bool few = row.n <= kFewColumns;
  if (few) __syncwarp();  // each lane reads all of its row
  const unsigned lightest = few ? row.lightest(limit_of(tau)) : 0;
  const Prefix skipped = few ? Prefix() : Prefix(row, limit_of(tau));
  const int shift = threadIdx.x % 32 / kLanesARow * kLanesARow;
  int ties_before = 0;
  for (int byte = 0; byte < p.kept_bytes(); ++byte) {
    const int j = byte * 8 + row.lane;
    const float weight = j < p.kv_blocks ? row.x[j] : kNeverChosen;
    const bool tie = weight == skipped.next;
    const unsigned tied = __ballot_sync(kWholeWarp, tie) >> shift & 0xff;
    const int rank = ties_before + __popc(tied & ((1u << row.lane) - 1));
    ties_before += __popc(tied);
    const bool skip =
        !whole && (few ? lightest >> byte & 1 : weight <= skipped.most || (tie && rank < skipped.ties));
    const unsigned bits = __ballot_sync(kWholeWarp, j < p.kv_blocks && !skip) >> shift & 0xff;
    if (writes && row.lane == 0) kept[byte] = static_cast<uint8_t>(bits);
  }
}

__global__ void __launch_bounds__(kMostWarps * 32) skip_kernel(const __grid_constant__ SelectProblem p) {
  let_next_start();
  wait_for_previous();
  extern __shared__ float4 memory[];
  const int rows = blockDim.x / kLanesARow, first_row = blockIdx.x * rows;
  const int head = blockIdx.y, batch = blockIdx.z;
  const Shared shared(reinterpret_cast<float*>(memory), p, rows);
  const float* keys = p.k_mean + batch * p.k_strides[0] + head / p.heads_a_kv_head * p.k_strides[2];
  copy_means(p.q_mean + batch * p.q_strides[0] + head * p.q_strides[2], p.q_strides[1], first_row, rows,
             p.q_blocks, p.dim, shared.queries, p.dim);
  for (int column = 0; column < p.kv_blocks; column += kColumns) {
    if (column > 0) __syncthreads();  // the keys before are multiplied
    copy_means(keys, p.k_strides[1], column, kColumns, p.kv_blocks, p.dim, shared.keys, key_stride(p.dim));
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    multiply(p, shared, column);
  }
  __syncwarp();  // from here on each warp is by itself

  const int own = threadIdx.x / kLanesARow, i = first_row + own;
  const Row row{shared.scores + own * score_stride(p.kv_blocks), p.kv_blocks,
                static_cast<int>(threadIdx.x % kLanesARow)};
  const bool exists = i < p.q_blocks;
  const int64_t of_head = int64_t(batch) * p.heads + head;
  if (exists && p.caches) {
    float* columns = p.text_columns + of_head * p.text_kv() * p.q_blocks + i;
    for (int j = row.lane; j < p.text_kv(); j += kLanesARow)
      columns[int64_t(j) * p.q_blocks] = row.x[p.text_kv_begin + j];
  }
  if (!exists) row.each([&](int j, float) { row.x[j] = 0; });
  const bool any = row.softmax();
  if (exists && p.caches && p.is_text_q(i)) {
    float* to = p.text_rows + (of_head * p.text_q() + i - p.text_q_begin) * p.kv_blocks;
    row.each([&](int j, float weight) { to[j] = weight; });
  }
  const float tau = p.ramped(p.tau_kv);
  const bool whole = !exists || !any || p.is_text_q(i) || !(tau > 0);
  choose(p, row, batch, head, tau, whole, exists,
         p.kept + (batch * p.tiles() + int64_t(i) * p.heads + head) * p.kept_bytes());
}

}  // namespace

int skip_shared_bytes(const SelectProblem& p, int warps) {
  const int64_t rows = warps * kRowsAWarp;
  const int64_t floats = kColumns * key_stride(p.dim) + rows * p.dim + rows * int64_t(score_stride(p.kv_blocks));
  return static_cast<int>(std::min<int64_t>(floats * 4, INT32_MAX));
}

void launch_skip(const SelectProblem& p, int device, cudaStream_t stream) {
  const int most = most_shared_bytes(device);
  static PerDevice configured;
  configured.once(device, [most] {
    check_cuda(cudaFuncSetAttribute(skip_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               "skip_kernel's shared memory");
  });
  int warps = kMostWarps;
  while (warps > 1 && skip_shared_bytes(p, warps) > most / 2) --warps;  // two blocks an SM where that can be
  const int rows = warps * kRowsAWarp;
  const dim3 grid((p.q_blocks + rows - 1) / rows, p.heads, p.batch);
  launch_next(skip_kernel, "skip_kernel", p, grid, warps * 32, skip_shared_bytes(p, warps), device, stream);
}

}  // namespace flashomni::cuda
