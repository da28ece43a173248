// Scores of the block means, and in each row the KV blocks with the smallest softmax mass, up to tau_kv.
//
// Scores stay in float32 without tensor cores: the choice must be that of the CPU but for rounding, and they
// cost little.
#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "src/cuda/common/chain.cuh"
#include "src/cuda/common/select/problem.cuh"

namespace flashomni::cuda {
namespace {

/// Floats of a key in shared memory: eight rows start in banks of their own, for reads of 16 bytes a lane.
__host__ __device__ constexpr int key_stride(int dim) {
  return dim + 4;
}

/// Has rows [first, first + count) of `means` copied into shared memory; past `blocks`, the last row again.
/// A warp a row; dim is a multiple of 4.
__device__ void copy_means(const float* means, int64_t stride, int first, int count, int blocks, int dim, float* to,
                           int to_stride) {
  const bool aligned = stride % 4 == 0 && reinterpret_cast<uintptr_t>(means) % 16 == 0;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < count; row += blockDim.x / 32) {
    const float* from = means + min(first + row, blocks - 1) * stride;
#pragma unroll 1
    for (int d = threadIdx.x % 32 * 4; d < dim; d += 128) {
      float* place = to + row * to_stride + d;
      if (aligned) {
        __pipeline_memcpy_async(place, from + d, 16);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) __pipeline_memcpy_async(place + i, from + d + i, 4);
      }
    }
  }
}

/// As the one instruction that it can be: of a plain sum, compilers make an addition and two selections.
__device__ void add_if(bool condition, double& sum, double value) {
  if (condition) sum = __dadd_rn(sum, value);
}

// Rows of any length. A warp takes four of one head. For the scores, its lanes are columns; for the rest,
// eight lanes work on a row, so that one ballot makes a byte of each row's bits.

constexpr int kRowsAWarp = 4, kLanesARow = 32 / kRowsAWarp;
constexpr int kMostWarps = 4;
constexpr int kColumns = 32;  // keys in shared memory at a time

/// Floats of a row of scores: 8 modulo 32, so that a warp's four rows lie in banks of their own.
__host__ __device__ constexpr int score_stride(int kv_blocks) {
  return (kv_blocks + 23) / 32 * 32 + 8;
}

struct Shared {
  float *keys, *queries, *scores;

  __device__ Shared(float* memory, const SelectProblem& p, int rows)
      : keys(memory), queries(keys + kColumns * key_stride(p.dim)), scores(queries + rows * p.dim) {}
};

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
          add_if(weight <= __uint_as_float(bits | digit << shift), sums[digit - 1], weight);
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
    if (p.is_text_kv(j) || j == heaviest || p.is_guarded(p.similarity(batch, head, j)))
      row.x[j] = kNeverChosen;
  });
  const Prefix skipped(row, limit_of(tau));
  const int shift = threadIdx.x % 32 / kLanesARow * kLanesARow;
  int ties_before = 0;
  for (int byte = 0; byte < p.kept_bytes(); ++byte) {
    const int j = byte * 8 + row.lane;
    const float weight = j < p.kv_blocks ? row.x[j] : kNeverChosen;
    const bool tie = weight == skipped.next;
    const unsigned tied = __ballot_sync(kWholeWarp, tie) >> shift & 0xff;
    const int rank = ties_before + __popc(tied & ((1u << row.lane) - 1));
    ties_before += __popc(tied);
    const bool skip = !whole && (weight <= skipped.most || (tie && rank < skipped.ties));
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
  const float ramp = p.ramp_value();
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
  const float tau = ramped(p.tau_kv, ramp);
  const bool whole = !exists || !any || p.is_text_q(i) || !(tau > 0);
  choose(p, row, batch, head, tau, whole, exists,
         p.kept + (batch * p.tiles() + int64_t(i) * p.heads + head) * p.kept_bytes());
}

int long_shared_bytes(const SelectProblem& p, int warps) {
  const int64_t rows = warps * kRowsAWarp;
  const int64_t floats = kColumns * key_stride(p.dim) + rows * p.dim + rows * int64_t(score_stride(p.kv_blocks));
  return static_cast<int>(std::min<int64_t>(floats * 4, INT32_MAX));
}

// Short rows, where nearly all time is latency: all keys are in shared memory at once, and a warp has a row,
// two columns a lane, in registers.

constexpr int kShortWarps = 8;  // and rows of a CTA
constexpr int kShort = 64, kOwn = kShort / 32;

bool is_short(const SelectProblem& p) {
  return p.kv_blocks <= kShort;
}

int short_shared_bytes(const SelectProblem& p) {
  return (p.kv_blocks * key_stride(p.dim) + kShortWarps * p.dim + kShortWarps * kShortWarps * kShort) * 4;
}

/// parts[row][warp][column]: this warp's part of every score of the CTA, over a share of the dimensions; so a
/// key is read from shared memory once.
__device__ void multiply_part(const SelectProblem& p, const float* keys, const float* queries, float* parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float4* key[kOwn];
#pragma unroll
  for (int c = 0; c < kOwn; ++c)
    key[c] = reinterpret_cast<const float4*>(keys + min(lane + c * 32, p.kv_blocks - 1) * key_stride(p.dim));
  const float4* query = reinterpret_cast<const float4*>(queries);
  float sum[kShortWarps][kOwn] = {};
#pragma unroll 1
  for (int d = warp; d < p.dim / 4; d += kShortWarps) {
    float4 k[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) k[c] = key[c][d];
#pragma unroll
    for (int r = 0; r < kShortWarps; ++r) {
      const float4 q = query[r * (p.dim / 4) + d];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        sum[r][c] += q.x * k[c].x;
        sum[r][c] += q.y * k[c].y;
        sum[r][c] += q.z * k[c].z;
        sum[r][c] += q.w * k[c].w;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kShortWarps; ++r) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) parts[(r * kShortWarps + warp) * kShort + c * 32 + lane] = sum[r][c];
  }
}

/// In place, of a row's columns that exist. False (all zero) if no score is finite.
__device__ bool softmax(const bool (&exists)[kOwn], float (&x)[kOwn]) {
  float peak = -INFINITY;
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    x[c] = exists[c] ? finite_or_lowest(x[c]) : -INFINITY;
    peak = fmaxf(peak, x[c]);
  }
  peak = maximum<32>(peak);
  const bool any = peak > -INFINITY;
  if (!any) peak = 0;
  double sum = 0;
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    x[c] = expf(x[c] - peak);
    sum += x[c];
  }
  sum = total<32>(sum);
  const double inverse = 1.0 / (any ? sum : 1.0);
#pragma unroll
  for (int c = 0; c < kOwn; ++c) x[c] = static_cast<float>(x[c] * inverse);
  return any;
}

/// The last of the heaviest columns of a row with a weight above 0.
__device__ int heaviest_of(const float (&weight)[kOwn]) {
  float most = 0;
#pragma unroll
  for (int c = 0; c < kOwn; ++c) most = fmaxf(most, weight[c]);
  most = maximum<32>(most);
  int at = -1;
#pragma unroll
  for (int c = 0; c < kOwn; ++c)
    if (weight[c] == most) at = threadIdx.x % 32 + c * 32;
  return __reduce_max_sync(kWholeWarp, at);
}

/// A weight with its index in bits of a double that a float leaves empty: ordered by (weight, index), no two
/// equal.
__device__ double with_index(float weight, int index) {
  return __longlong_as_double(__double_as_longlong(weight) | index);
}
__device__ double without_index(double key) {
  return __longlong_as_double(__double_as_longlong(key) & ~int64_t{kShort - 1});
}

/// Which of this lane's columns are skipped: those up to which the weights, in the order of (weight, index)
/// and their own included, add up to at most `limit`; weights above 1 never are. `keys`: room for a row.
__device__ void skip_lightest(const float (&weight)[kOwn], int columns, double limit, double* keys,
                              bool (&skip)[kOwn]) {
  const int lane = threadIdx.x % 32;
  double own[kOwn], mass[kOwn] = {};
#pragma unroll
  for (int c = 0; c < kOwn; ++c) keys[lane + c * 32] = own[c] = with_index(weight[c], lane + c * 32);
  __syncwarp();
#pragma unroll 2
  for (int j = 0; j < columns; j += 2) {  // the one past the end is never lighter
    const double2 two = *reinterpret_cast<const double2*>(keys + j);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      add_if(two.x <= own[c], mass[c], without_index(two.x));
      add_if(two.y <= own[c], mass[c], without_index(two.y));
    }
  }
#pragma unroll
  for (int c = 0; c < kOwn; ++c) skip[c] = weight[c] <= 1 && mass[c] <= limit;
}

__global__ void __launch_bounds__(kShortWarps * 32, 1)
    skip_short_kernel(const __grid_constant__ SelectProblem p) {
  let_next_start();
  wait_for_previous();
  extern __shared__ float4 memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * kShortWarps, head = blockIdx.y, batch = blockIdx.z;
  float* keys = reinterpret_cast<float*>(memory);
  float *queries = keys + p.kv_blocks * key_stride(p.dim), *parts = queries + kShortWarps * p.dim;
  copy_means(p.q_mean + batch * p.q_strides[0] + head * p.q_strides[2], p.q_strides[1], first_row,
             kShortWarps, p.q_blocks, p.dim, queries, p.dim);
  copy_means(p.k_mean + batch * p.k_strides[0] + head / p.heads_a_kv_head * p.k_strides[2], p.k_strides[1], 0,
             p.kv_blocks, p.kv_blocks, p.dim, keys, key_stride(p.dim));
  __pipeline_commit();
  const float ramp = p.ramp_value();
  float similarity[kOwn];
#pragma unroll
  for (int c = 0; c < kOwn; ++c)
    similarity[c] = p.similarity(batch, head, min(lane + c * 32, p.kv_blocks - 1));
  bool exists[kOwn], never[kOwn];  // columns, and those never skipped
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    const int j = lane + c * 32;
    exists[c] = j < p.kv_blocks;
    never[c] = !exists[c] || p.is_text_kv(j) || p.is_guarded(similarity[c]);
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  multiply_part(p, keys, queries, parts);
  __syncthreads();
  const int i = first_row + warp;
  if (i >= p.q_blocks) return;

  const int64_t of_head = int64_t(batch) * p.heads + head;
  float* own = parts + warp * kShortWarps * kShort;
  float x[kOwn] = {};
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    const int j = lane + c * 32;
#pragma unroll
    for (int part = 0; part < kShortWarps; ++part) x[c] += own[part * kShort + j];
    x[c] *= p.scale;
    if (p.caches && p.is_text_kv(j))
      p.text_columns[(of_head * p.text_kv() + j - p.text_kv_begin) * p.q_blocks + i] = x[c];
  }
  const bool any = softmax(exists, x);
  if (p.caches && p.is_text_q(i)) {
    float* to = p.text_rows + (of_head * p.text_q() + i - p.text_q_begin) * p.kv_blocks;
#pragma unroll
    for (int c = 0; c < kOwn; ++c)
      if (exists[c]) to[lane + c * 32] = x[c];
  }
  const float tau = ramped(p.tau_kv, ramp);
  bool skip[kOwn] = {};
  if (any && !p.is_text_q(i) && tau > 0) {                        // the same for all of the warp
    const int heaviest = p.text_kv() == 0 ? heaviest_of(x) : -1;  // a row keeps a block
#pragma unroll
    for (int c = 0; c < kOwn; ++c)
      if (never[c] || lane + c * 32 == heaviest) x[c] = kNeverChosen;
    __syncwarp();  // all have read their parts
    skip_lightest(x, p.kv_blocks, limit_of(tau), reinterpret_cast<double*>(own), skip);
  }
  unsigned words[kOwn];
#pragma unroll
  for (int c = 0; c < kOwn; ++c) words[c] = __ballot_sync(kWholeWarp, exists[c] && !skip[c]);
  static_assert(kOwn == 2);
  const unsigned word = lane < 4 ? words[0] : lane < 8 ? words[1] : 0;
  if (lane < p.kept_bytes())
    p.kept[(batch * p.tiles() + int64_t(i) * p.heads + head) * p.kept_bytes() + lane] =
        static_cast<uint8_t>(word >> lane % 4 * 8);
}

}  // namespace

int skip_shared_bytes(const SelectProblem& p) {
  return is_short(p) ? short_shared_bytes(p) : long_shared_bytes(p, 1);
}

void launch_skip(const SelectProblem& p, int device, cudaStream_t stream) {
  const int most = most_shared_bytes(device);
  static PerDevice configured;
  configured.once(device, [most] {
    for (const auto kernel : {skip_kernel, skip_short_kernel})
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                 "the skip kernels' shared memory");
  });
  if (is_short(p)) {
    const dim3 grid((p.q_blocks + kShortWarps - 1) / kShortWarps, p.heads, p.batch);
    launch_next(skip_short_kernel, "skip_short_kernel", p, grid, kShortWarps * 32, short_shared_bytes(p),
                device, stream);
    return;
  }
  int warps = kMostWarps;
  while (warps > 1 && long_shared_bytes(p, warps) > most / 2) --warps;  // two blocks an SM where that can be
  const int rows = warps * kRowsAWarp;
  const dim3 grid((p.q_blocks + rows - 1) / rows, p.heads, p.batch);
  launch_next(skip_kernel, "skip_kernel", p, grid, warps * 32, long_shared_bytes(p, warps), device, stream);
}

}  // namespace flashomni::cuda
