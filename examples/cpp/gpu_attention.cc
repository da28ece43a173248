// Block-sparse attention on a GPU, in memory and on a stream of the program's own; one row is checked by
// hand.
//
// The CUDA backend is a plugin: FLASHOMNI_PLUGIN_PATH names the folder of libflashomni_cuda_sm90.so, or it
// lies beside the library. Exits with 77 where there is no CUDA device.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashomni/attention.h"
#include "flashomni/error.h"

namespace fo = flashomni;

namespace {

constexpr int64_t kTokens = 1000, kHeads = 4, kDim = 64, kElements = kTokens * kHeads * kDim;
constexpr int kNoDevice = 77;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

/// Device memory for as long as the object lives.
class Memory {
 public:
  explicit Memory(size_t bytes) { check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)), "cudaMalloc"); }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// bfloat16 is the upper half of a float32.
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

std::vector<uint16_t> random_tensor(std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(kElements);
  for (uint16_t& value : values) value = to_bfloat16(normal(random));
  return values;
}

template <class T>
void upload(const Memory& memory, const std::vector<T>& values, const Stream& stream) {
  check(cudaMemcpyAsync(memory.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice,
                        stream.get()),
        "cudaMemcpyAsync");
}

fo::TensorView on_device(void* data, fo::DType dtype, std::initializer_list<int64_t> shape) {
  return fo::make_view(data, dtype, shape, {fo::DeviceType::kCUDA, 0});
}

/// How far row 500 of head 2 is from the definition of softmax over the blocks that it sees.
double worst_difference(const std::vector<uint16_t>& q, const std::vector<uint16_t>& k,
                        const std::vector<uint16_t>& v, const std::vector<uint16_t>& out) {
  const int64_t row = 500, head = 2, block = row / 128;
  const auto at = [](const std::vector<uint16_t>& x, int64_t token, int64_t d) {
    return static_cast<double>(from_bfloat16(x[(token * kHeads + head) * kDim + d]));
  };
  double total = 0, sum[kDim] = {};
  for (int64_t t = 0; t < kTokens; ++t) {
    if (std::abs(t / 128 - block) > 1) continue;
    double dot = 0;
    for (int64_t d = 0; d < kDim; ++d) dot += at(q, row, d) * at(k, t, d);
    const double weight = std::exp(dot / std::sqrt(static_cast<double>(kDim)));
    total += weight;
    for (int64_t d = 0; d < kDim; ++d) sum[d] += weight * at(v, t, d);
  }
  double worst = 0;
  for (int64_t d = 0; d < kDim; ++d) worst = std::max(worst, std::fabs(at(out, row, d) - sum[d] / total));
  return worst;
}

}  // namespace

int main() try {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: nothing was run\n");
    return kNoDevice;
  }
  std::mt19937 random(0);
  const std::vector<uint16_t> q = random_tensor(random), k = random_tensor(random), v = random_tensor(random);

  // Each query block sees itself and its neighbours; block 3 of head 0 is cached.
  fo::SymbolGeometry geometry;
  geometry.q_tokens = geometry.kv_tokens = kTokens;
  geometry.heads = kHeads;
  std::vector<uint8_t> cache(geometry.cache_bytes(), 0xff), skip(geometry.skip_bytes(), 0);
  fo::write_bit(cache.data(), 3 * kHeads + 0, false);
  for (int64_t i = 0; i < geometry.q_blocks(); ++i) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t j = std::max<int64_t>(0, i - 1); j < std::min(geometry.kv_blocks(), i + 2); ++j) {
        fo::write_bit(skip.data(), (i * kHeads + h) * geometry.kv_blocks() + j, true);
      }
    }
  }

  const Stream stream;
  const size_t bytes = kElements * sizeof(uint16_t);
  const Memory q_memory(bytes), k_memory(bytes), v_memory(bytes), out_memory(bytes);
  const Memory cache_memory(cache.size()), skip_memory(skip.size());
  upload(q_memory, q, stream), upload(k_memory, k, stream), upload(v_memory, v, stream);
  upload(cache_memory, cache, stream), upload(skip_memory, skip, stream);
  std::vector<uint16_t> out(kElements, to_bfloat16(7.0f));  // cached tiles keep it
  upload(out_memory, out, stream);

  const auto view = [](const Memory& memory) {
    return on_device(memory.data(), fo::DType::kBFloat16, {1, kTokens, kHeads, kDim});
  };
  fo::AttentionArguments arguments;
  arguments.q = view(q_memory), arguments.k = view(k_memory), arguments.v = view(v_memory);
  arguments.out = view(out_memory);
  arguments.symbols.cache = on_device(cache_memory.data(), fo::DType::kUInt8, {1, geometry.cache_bytes()});
  arguments.symbols.skip = on_device(skip_memory.data(), fo::DType::kUInt8, {1, geometry.skip_bytes()});

  fo::Context context;
  context.stream = stream.get();
  context.workspace_bytes = fo::attention_workspace(arguments, context);
  const Memory workspace(context.workspace_bytes);
  context.workspace = workspace.data();
  fo::attention(arguments, context);
  check(cudaMemcpyAsync(out.data(), out_memory.data(), bytes, cudaMemcpyDeviceToHost, stream.get()),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");

  const double worst = worst_difference(q, k, v, out);
  const float cached = from_bfloat16(out[3 * 128 * kHeads * kDim]);
  std::printf("backend                %s\n", fo::backend_for(arguments.q.device).name);
  std::printf("row 500, head 2        differs from the naive sum by at most %.1e\n", worst);
  std::printf("a cached tile's row    %g, as it was\n", cached);
  return worst < 1e-2 && cached == 7.0f ? 0 : 1;
} catch (const fo::Error& error) {
  std::fprintf(stderr, "%s: %s\n", error.kind_name(), error.what());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
