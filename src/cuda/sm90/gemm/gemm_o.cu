#include "src/cuda/sm90/gemm/gemm.h"

#include <algorithm>

#include "src/cuda/sm90/gemm/counter.h"
#include "src/cuda/sm90/gemm/gemm_o_consumer.cuh"
#include "src/cuda/sm90/gemm/host.h"

namespace flashomni::cuda::sm90 {
namespace {

constexpr const char* kO[] = {"o[0]", "o[1]", "o[2]", "o[3]"};
constexpr const char* kCached[] = {"cached[0]", "cached[1]", "cached[2]", "cached[3]"};

int ceil_of(int64_t value, int64_t unit) {
  return static_cast<int>((value + unit - 1) / unit);
}

/// What Update and Dispatch share.
OParameters parameters_of(const TensorView& o, const char* o_name, const TensorView& past,
                          const TensorView& weight, const TensorView& out, int orders, int64_t head_dim,
                          const TileSymbols& tiles) {
  check_sizes(o, o_name);
  check_sizes(weight, "weight");
  check_size(tiles.row_offset, "row_offset");
  const RowBlocks blocks(tiles, o.size(1));
  const int64_t columns = tiles.heads * head_dim;
  OParameters p{};
  p.o[0] = matrix_map(o, 0, tiles.heads, head_dim, 64, o_name);
  p.weight = matrix_map(weight, 0, tiles.heads, head_dim, 128, "weight");
  p.past = static_cast<int>(weight.size(1) - columns);
  if (p.past > 0) {
    p.o_past = past.present() ? matrix_map(past, 64, "past") : matrix_map(o, columns, 1, p.past, 64, o_name);
    p.weight_past = matrix_map(weight, columns, 1, p.past, 128, "weight");
  }
  p.out = output_of(out, 1, 64, "out");
  p.cache = bits_of(tiles.cache, tiles.cache_indptr);
  p.weight_policy = weight_policy(weight);
  p.orders = orders, p.heads = static_cast<int>(tiles.heads), p.head_dim = static_cast<int>(head_dim);
  p.block_q = tiles.block_q, p.first_block = blocks.first;
  p.rows = static_cast<int>(o.size(1)), p.row_offset = static_cast<int>(tiles.row_offset);
  p.row_tiles = ceil_of(int64_t(blocks.count) * tiles.block_q, GemmSizes::kNarrow);
  p.batch = static_cast<int>(o.size(0));
  p.features = static_cast<int>(weight.size(0));
  const int64_t count = int64_t(p.row_tiles) * p.batch * orders * p.item_columns(1);
  if (count > INT32_MAX / 4)
    throw Error(ErrorKind::kNotImplemented,
                text("out: expected fewer than 2^29 tiles (cuda_sm90), got ", count));
  return p;
}

/// What is left over from whole rounds (all clusters busy) is halved where its halves fit one. Of rows that are kept
/// only the device knows: there a round's worth is halved, as the last round is nowhere near full on average.
void divide(OParameters& p, int device) {
  p.sharers = p.features > GemmSizes::kWide ? 2 : 1;
  const int whole = p.tile_rows() * p.item_columns(p.sharers), clusters = clusters_of(device, p.sharers);
  const int rest = whole % clusters;
  const int halved = p.dispatches() && p.keeps_rows ? std::min(whole, clusters) : 2 * rest <= clusters ? rest : 0;
  p.kept = whole - halved, p.items = whole + halved;
}

void launch(OParameters& p, DType dtype, int device, const Context& context) {
  divide(p, device);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  p.counter = zero_counter(context, device);
  if (dtype == DType::kFloat16)
    launch_gemm<GemmO<__half>>(p, device, stream);
  else
    launch_gemm<GemmO<__nv_bfloat16>>(p, device, stream);
}

}  // namespace

size_t gemm_o_update_workspace(const GemmOUpdateArguments&, const Context&) {
  return kWorkspaceAlignment;
}
size_t gemm_o_dispatch_workspace(const GemmODispatchArguments&, const Context&) {
  return kWorkspaceAlignment;
}

void gemm_o_update(const GemmOUpdateArguments& a, const Context& context) {
  OParameters p =
      parameters_of(a.o[0], kO[0], a.past, a.weight, a.out, a.orders, a.head_dim, a.tiles);
  for (int i = 1; i < a.orders; ++i) p.o[i] = matrix_map(a.o[i], 0, a.tiles.heads, a.head_dim, 64, kO[i]);
  for (int i = 0; i < a.orders; ++i) p.cached[i] = output_of(a.cached[i], 1, 64, kCached[i]);
  p.bias = a.bias.present() ? a.bias.data : nullptr;
  p.keeps_rows = a.keep_rows;
  launch(p, a.out.dtype, a.out.device.id, context);
}

void gemm_o_dispatch(const GemmODispatchArguments& a, const Context& context) {
  OParameters p = parameters_of(a.o, "o", a.past, a.weight, a.out, a.orders, a.head_dim, a.tiles);
  for (int i = 0; i < a.orders; ++i) p.cached[i] = output_of(a.cached[i], 1, 64, kCached[i]);
  p.coefficients = a.coefficients.as<const float>();
  p.coefficient_stride = a.coefficients.strides[0];
  p.keeps_rows = a.keep_rows;
  launch(p, a.out.dtype, a.out.device.id, context);
}

}  // namespace flashomni::cuda::sm90
