// Symbols of whole batches: their bytes by element, and their conversion to and from block lists.
#include "flashomni/symbols.h"

#include <cstring>
#include <vector>

#include "flashomni/error.h"
#include "src/core/check.h"

namespace flashomni {
namespace {

void check_geometry(const SymbolGeometry& geometry) {
  check::at_least(geometry.q_tokens, 0, "q_tokens");
  check::at_least(geometry.kv_tokens, 0, "kv_tokens");
  check::at_least(geometry.heads, 1, "heads");
  check::block_pair(geometry.block_q, geometry.block_kv);
}

/// What both directions ask of their arguments.
void check_lists(const Symbols& symbols, const SymbolGeometry& geometry, int64_t batch,
                 const TensorView& indices, const TensorView& counts) {
  check_geometry(geometry);
  check::at_least(batch, 0, "batch");
  const Device cpu;
  check::tensor(indices, "indices", DType::kInt32, cpu,
                {batch, geometry.heads, geometry.q_blocks(), check::kAny});
  check::tensor(counts, "counts", DType::kInt32, cpu, {batch, geometry.heads, geometry.q_blocks()});
  check::disjoint(indices, "indices", counts, "counts");
  if (!symbols.skip.present()) fail(ErrorKind::kType, "symbols.skip", "a tensor", "nothing");
  check::bits(symbols.cache, symbols.cache_indptr, batch, cpu, "symbols.cache",
              [&](int64_t) { return geometry.cache_bytes(); });
  check::bits(symbols.skip, symbols.skip_indptr, batch, cpu, "symbols.skip",
              [&](int64_t) { return geometry.skip_bytes(); });
  for (const TensorView* list : {&indices, &counts}) {
    const char* name = list == &indices ? "indices" : "counts";
    check::disjoint(*list, name, symbols.skip, "symbols.skip");
    check::disjoint(*list, name, symbols.cache, "symbols.cache");
  }
}

template <class Visit>
void for_each_row(const SymbolGeometry& geometry, int64_t batch, Visit&& visit) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < geometry.heads; ++h) {
      for (int64_t i = 0; i < geometry.q_blocks(); ++i) visit(b, h, i);
    }
  }
}

int32_t* row_of(const TensorView& lists, int64_t b, int64_t h, int64_t i) {
  return lists.as<int32_t>() + b * lists.strides[0] + h * lists.strides[1] + i * lists.strides[2];
}

}  // namespace

const uint8_t* element_bytes(const TensorView& bits, const TensorView& indptr, int64_t batch_index) {
  if (!bits.present()) return nullptr;
  const int64_t first =
      indptr.present() ? indptr.as<const int32_t>()[batch_index] : batch_index * bits.strides[0];
  return bits.as<const uint8_t>() + first;
}

void check_bits(const TensorView& bits, const TensorView& indptr, int64_t batch, const int64_t* bytes_needed,
                const char* name) {
  check::bits(bits, indptr, batch, bits.device, name, [&](int64_t b) { return bytes_needed[b]; });
}

void to_block_lists(const Symbols& symbols, const SymbolGeometry& geometry, int64_t batch,
                    const TensorView& indices, const TensorView& counts) {
  check_lists(symbols, geometry, batch, indices, counts);
  check::output(indices, "indices");
  check::output(counts, "counts");
  const int64_t columns = geometry.kv_blocks(), capacity = indices.size(3);
  const auto row_bits = [&](int64_t b, int64_t h, int64_t i) {
    const int64_t tile = i * geometry.heads + h;
    const uint8_t* cache = element_bytes(symbols.cache, symbols.cache_indptr, b);
    const bool active = BitRow(cache, 0, geometry.cache_bits())[tile];
    return BitRow(element_bytes(symbols.skip, symbols.skip_indptr, b), tile * columns, active ? columns : 0);
  };
  for_each_row(geometry, batch, [&](int64_t b, int64_t h, int64_t i) {
    const int64_t count = row_bits(b, h, i).count();
    if (count > capacity) {
      fail(ErrorKind::kValue, "indices",
           text("room for ", count, " blocks in row [", b, ", ", h, ", ", i, "]"), describe(indices));
    }
  });
  for_each_row(geometry, batch, [&](int64_t b, int64_t h, int64_t i) {
    const BitRow bits = row_bits(b, h, i);
    int32_t* row = row_of(indices, b, h, i);
    int32_t count = 0;
    for (int64_t j = bits.next(0); j < bits.length(); j = bits.next(j + 1))
      row[count++] = static_cast<int32_t>(j);
    *row_of(counts, b, h, i) = count;
    std::fill(row + count, row + capacity, 0);
  });
}

void from_block_lists(const TensorView& indices, const TensorView& counts, const SymbolGeometry& geometry,
                      const Symbols& symbols) {
  if (!indices.present()) fail(ErrorKind::kType, "indices", "a tensor", "nothing");
  const int64_t batch = indices.size(0);
  check_lists(symbols, geometry, batch, indices, counts);
  check::output(symbols.skip, "symbols.skip");
  check::disjoint(symbols.skip, "symbols.skip", symbols.cache, "symbols.cache");
  const int64_t columns = geometry.kv_blocks(), capacity = indices.size(3);
  for_each_row(geometry, batch, [&](int64_t b, int64_t h, int64_t i) {
    const int32_t count = *row_of(counts, b, h, i);
    const std::string where = text("[", b, ", ", h, ", ", i, "]");
    if (count < 0 || count > capacity) {
      fail(ErrorKind::kValue, text("counts", where), text("0 to ", capacity), text(count));
    }
    const int32_t* row = row_of(indices, b, h, i);
    for (int32_t n = 0; n < count; ++n) {
      if (row[n] < 0 || row[n] >= columns) {
        fail(ErrorKind::kValue, text("indices", where), text("blocks of 0 to ", columns - 1), text(row[n]));
      }
    }
  });
  const auto writable = [](const TensorView& bits, const TensorView& indptr, int64_t b) {
    return const_cast<uint8_t*>(element_bytes(bits, indptr, b));
  };
  for (int64_t b = 0; b < batch; ++b) {
    std::memset(writable(symbols.skip, symbols.skip_indptr, b), 0,
                static_cast<size_t>(geometry.skip_bytes()));
    if (symbols.cache.present()) {
      std::memset(writable(symbols.cache, symbols.cache_indptr, b), 0,
                  static_cast<size_t>(geometry.cache_bytes()));
    }
  }
  for_each_row(geometry, batch, [&](int64_t b, int64_t h, int64_t i) {
    const int32_t count = *row_of(counts, b, h, i);
    const int32_t* row = row_of(indices, b, h, i);
    const int64_t tile = i * geometry.heads + h;
    uint8_t* skip = writable(symbols.skip, symbols.skip_indptr, b);
    for (int32_t n = 0; n < count; ++n) write_bit(skip, tile * columns + row[n], true);
    if (symbols.cache.present() && count > 0) {
      write_bit(writable(symbols.cache, symbols.cache_indptr, b), tile, true);
    }
  });
}

}  // namespace flashomni
