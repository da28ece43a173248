#include "flashomni/symbols.h"

#include <algorithm>
#include <memory>

#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::Array;
using testing::Masks;
using testing::Random;
using testing::uniform;

/// Exactly `n` bytes on the heap, so that a sanitizer sees one byte too many.
std::unique_ptr<uint8_t[]> random_bytes(int64_t n, double density, Random& random) {
  auto bytes = std::make_unique<uint8_t[]>(static_cast<size_t>(n));
  std::bernoulli_distribution bit(density);
  for (int64_t i = 0; i < n * 8; ++i) write_bit(bytes.get(), i, bit(random));
  return bytes;
}

TEST(BitRowTest, CountAndNextAgreeWithBits) {
  Random random(2);
  for (int trial = 0; trial < 2000; ++trial) {
    const int64_t first = uniform(random, 0, 90), length = uniform(random, 0, 300);
    const double density = trial % 3 == 0 ? 0.02 : 0.5;
    const auto bytes = random_bytes((first + length + 7) / 8, density, random);
    const BitRow row(bytes.get(), first, length);
    int64_t count = 0, next = length;
    for (int64_t i = length - 1; i >= 0; --i) {
      const bool set = (bytes[(first + i) / 8] >> ((first + i) % 8)) & 1;
      ASSERT_EQ(row[i], set);
      count += set;
      if (set) next = i;
      ASSERT_EQ(row.next(i), next);
    }
    ASSERT_EQ(row.count(), count);
    ASSERT_EQ(row.next(length), length);
    ASSERT_EQ(row.next(length + 5), length);
  }
}

TEST(BitRowTest, AbsentReadsAsOnes) {
  const BitRow row(nullptr, 5, 77);
  EXPECT_EQ(row.count(), 77);
  EXPECT_TRUE(row[76]);
  EXPECT_EQ(row.next(3), 3);
  EXPECT_EQ(row.next(77), 77);
}

TEST(PackTest, MatchesNumpyByHand) {
  const uint8_t values[] = {1, 0, 1, 1, 0, 0, 0, 7, 0, 1};
  uint8_t out[2];
  pack_bits(values, 10, BitOrder::kLittle, out);  // numpy.packbits(values, bitorder="little")
  EXPECT_EQ(out[0], 0b10001101);
  EXPECT_EQ(out[1], 0b00000010);
  pack_bits(values, 10, BitOrder::kBig, out);  // numpy.packbits(values)
  EXPECT_EQ(out[0], 0b10110001);
  EXPECT_EQ(out[1], 0b01000000);
}

TEST(PackTest, RoundTripsAtEveryLength) {
  Random random(3);
  for (int64_t n = 0; n < 200; ++n) {
    std::vector<uint8_t> values(n), back(n);
    for (auto& value : values) value = static_cast<uint8_t>(uniform(random, 0, 1));
    for (const BitOrder order : {BitOrder::kLittle, BitOrder::kBig}) {
      std::vector<uint8_t> bytes((n + 7) / 8, 0xFF);
      pack_bits(values.data(), n, order, bytes.data());
      for (int64_t i = 0; i < n; ++i) {
        const int64_t shift = order == BitOrder::kLittle ? i % 8 : 7 - i % 8;
        ASSERT_EQ((bytes[i / 8] >> shift) & 1, values[i]);
      }
      int64_t set = 0;
      for (const uint8_t byte : bytes) set += std::popcount(byte);
      ASSERT_EQ(set, std::count(values.begin(), values.end(), 1)) << "padding bits must be 0";
      unpack_bits(bytes.data(), n, order, back.data());
      ASSERT_EQ(values, back);
    }
  }
}

TEST(SegmentPackTest, EachSegmentStartsOnAByte) {
  Random random(4);
  for (int trial = 0; trial < 100; ++trial) {
    std::vector<int32_t> ends = {0}, byte_ends = {0};
    for (int64_t s = uniform(random, 0, 6); s > 0; --s) {
      const int32_t length = static_cast<int32_t>(uniform(random, 0, 40));
      ends.push_back(ends.back() + length);
      byte_ends.push_back(byte_ends.back() + (length + 7) / 8);
    }
    Array values(DType::kUInt8, {ends.back()});
    values.fill([&] { return static_cast<double>(uniform(random, 0, 1)); });
    const Array indptr = Array::ints(ends);
    Array out(DType::kUInt8, {byte_ends.back()});
    Array out_indptr(DType::kInt32, {static_cast<int64_t>(ends.size())});
    for (const BitOrder order : {BitOrder::kLittle, BitOrder::kBig}) {
      segment_pack_bits(values, indptr, order, out, out_indptr);
      EXPECT_EQ(out_indptr.storage(), Array::ints(byte_ends).storage());
      for (size_t s = 0; s + 1 < ends.size(); ++s) {
        std::vector<uint8_t> expected(byte_ends[s + 1] - byte_ends[s]);
        pack_bits(values.storage().data() + ends[s], ends[s + 1] - ends[s], order, expected.data());
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), out.storage().begin() + byte_ends[s]));
      }
    }
  }
}

TEST(SegmentPackTest, RefusesWhatDoesNotFit) {
  Array values(DType::kUInt8, {20}), out(DType::kUInt8, {4}), out_indptr(DType::kInt32, {3});
  const auto run = [&](const TensorView& v, const TensorView& p, const TensorView& o, const TensorView& q) {
    segment_pack_bits(v, p, BitOrder::kLittle, o, q);
  };
  const Array indptr = Array::ints({0, 9, 20});
  EXPECT_NO_THROW(run(values, indptr, out, out_indptr));
  EXPECT_FAILS(run(TensorView{}, indptr, out, out_indptr), kType, "values");
  EXPECT_FAILS(run(Array(DType::kInt32, {20}), indptr, out, out_indptr), kType, "values");
  EXPECT_FAILS(run(values, Array::ints({0, 9, 21}), out, out_indptr), kValue, "indptr");
  EXPECT_FAILS(run(values, Array::ints({0, 9, 8}), out, out_indptr), kValue, "indptr");
  EXPECT_FAILS(run(values, Array::ints({-1, 9, 20}), out, out_indptr), kValue, "indptr");
  EXPECT_FAILS(run(values, Array::ints({}), out, out_indptr), kValue, "indptr");
  EXPECT_FAILS(run(values, indptr, Array(DType::kUInt8, {3}), out_indptr), kValue, "out");
  EXPECT_FAILS(run(values, indptr, out, Array(DType::kInt32, {2})), kValue, "out_indptr");
  EXPECT_FAILS(run(values, indptr, make_view(values.bytes() + 1, DType::kUInt8, {4}), out_indptr), kValue,
               "out");
}

SymbolGeometry random_geometry(Random& random) {
  SymbolGeometry g;
  g.q_tokens = uniform(random, 1, 900);
  g.kv_tokens = uniform(random, 1, 900);
  g.heads = uniform(random, 1, 5);
  const int32_t pairs[][2] = {{128, 128}, {128, 64}, {64, 64}};
  const auto& pair = pairs[uniform(random, 0, 2)];
  g.block_q = pair[0], g.block_kv = pair[1];
  return g;
}

TEST(BlockListTest, ListsAreTheBits) {
  Random random(5);
  for (int trial = 0; trial < 100; ++trial) {
    const SymbolGeometry g = random_geometry(random);
    const int64_t batch = uniform(random, 1, 3);
    const Masks masks = Masks::random(g, batch, 0.7, 0.4, random);
    Array indices(DType::kInt32, {batch, g.heads, g.q_blocks(), g.kv_blocks()});
    Array counts(DType::kInt32, {batch, g.heads, g.q_blocks()});
    indices.fill([] { return -9.0; });
    to_block_lists(masks.symbols(), g, batch, indices, counts);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < g.heads; ++h) {
        for (int64_t i = 0; i < g.q_blocks(); ++i) {
          int64_t count = 0;
          for (int64_t j = 0; j < g.kv_blocks(); ++j) {
            if (!masks.active(b, h, i) || !masks.selected(b, h, i, j)) continue;
            ASSERT_EQ(indices(b, h, i, count++), j);
          }
          ASSERT_EQ(counts(b, h, i), count);
          for (; count < g.kv_blocks(); ++count) ASSERT_EQ(indices(b, h, i, count), 0);
        }
      }
    }
  }
}

TEST(BlockListTest, RoundTripClearsCachedRows) {
  Random random(6);
  for (int trial = 0; trial < 100; ++trial) {
    const SymbolGeometry g = random_geometry(random);
    const int64_t batch = uniform(random, 1, 3);
    const Masks masks = Masks::random(g, batch, 0.7, 0.4, random);
    Array indices(DType::kInt32, {batch, g.heads, g.q_blocks(), g.kv_blocks() + 2});
    Array counts(DType::kInt32, {batch, g.heads, g.q_blocks()});
    to_block_lists(masks.symbols(), g, batch, indices, counts);
    Masks back = Masks::random(g, batch, 0.5, 0.5, random);
    from_block_lists(indices, counts, g, back.symbols());
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < g.heads; ++h) {
        for (int64_t i = 0; i < g.q_blocks(); ++i) {
          bool any = false;
          for (int64_t j = 0; j < g.kv_blocks(); ++j) {
            const bool expected = masks.active(b, h, i) && masks.selected(b, h, i, j);
            ASSERT_EQ(back.selected(b, h, i, j), expected);
            any |= expected;
          }
          ASSERT_EQ(back.active(b, h, i), any);
        }
      }
      if (g.skip_bits() % 8 == 0) continue;
      ASSERT_EQ(back.skip_row(b)[g.skip_bytes() - 1] >> (g.skip_bits() % 8), 0);
    }
  }
}

TEST(BlockListTest, ReadsElementsThroughIndptr) {
  Random random(7);
  SymbolGeometry g;
  g.q_tokens = 300, g.kv_tokens = 400, g.heads = 3;
  Masks masks = Masks::random(g, 2, 0.7, 0.4, random);
  Array indices(DType::kInt32, {2, 3, 3, 4}), counts(DType::kInt32, {2, 3, 3});
  Array again(DType::kInt32, {2, 3, 3, 4}), counts_again(DType::kInt32, {2, 3, 3});
  to_block_lists(masks.symbols(), g, 2, indices, counts);
  Symbols flat = masks.symbols();
  const int32_t cache = static_cast<int32_t>(g.cache_bytes()), skip = static_cast<int32_t>(g.skip_bytes());
  flat.cache = make_view(masks.cache_bits.bytes(), DType::kUInt8, {2 * cache});
  flat.skip = make_view(masks.skip_bits.bytes(), DType::kUInt8, {2 * skip});
  const Array cache_indptr = Array::ints({0, cache, 2 * cache}),
              skip_indptr = Array::ints({0, skip, 2 * skip});
  flat.cache_indptr = cache_indptr, flat.skip_indptr = skip_indptr;
  to_block_lists(flat, g, 2, again, counts_again);
  EXPECT_EQ(indices.storage(), again.storage());
  EXPECT_EQ(counts.storage(), counts_again.storage());
}

TEST(BlockListTest, RefusesWhatDoesNotFit) {
  Random random(8);
  SymbolGeometry g;
  g.q_tokens = 300, g.kv_tokens = 400, g.heads = 3;
  Masks masks = Masks::random(g, 2, 1, 1, random);
  Array indices(DType::kInt32, {2, 3, 3, 4}), counts(DType::kInt32, {2, 3, 3});
  const auto run = [&](const Symbols& s, const TensorView& i, const TensorView& c) {
    to_block_lists(s, g, 2, i, c);
  };
  const Symbols good = masks.symbols();
  EXPECT_NO_THROW(run(good, indices, counts));
  Array narrow(DType::kInt32, {2, 3, 3, 3});
  narrow.fill([] { return 5.0; });
  const Array before = narrow;
  EXPECT_FAILS(run(good, narrow, counts), kValue, "indices");
  EXPECT_EQ(narrow.storage(), before.storage()) << "written before the error";
  EXPECT_FAILS(run(good, Array(DType::kInt32, {2, 3, 2, 4}), counts), kValue, "indices");
  EXPECT_FAILS(run(good, indices, Array(DType::kUInt8, {2, 3, 3})), kType, "counts");
  Symbols s = good;
  s.skip = TensorView{};
  EXPECT_FAILS(run(s, indices, counts), kType, "symbols.skip");
  s = good, s.skip.shape[1] -= 1;
  EXPECT_FAILS(run(s, indices, counts), kValue, "symbols.skip");
  s = good, s.cache.shape[0] = 1;
  EXPECT_FAILS(run(s, indices, counts), kValue, "symbols.cache");
  SymbolGeometry odd = g;
  odd.block_kv = 96;
  EXPECT_FAILS(to_block_lists(good, odd, 2, indices, counts), kValue, "block_kv");

  run(good, indices, counts);
  indices.set(4, 1, 2, 0, 1);
  EXPECT_FAILS(from_block_lists(indices, counts, g, good), kValue, "indices[1, 2, 0]");
  indices.set(-1, 1, 2, 0, 1);
  EXPECT_FAILS(from_block_lists(indices, counts, g, good), kValue, "indices[1, 2, 0]");
  counts.set(5, 0, 1, 2);
  EXPECT_FAILS(from_block_lists(indices, counts, g, good), kValue, "counts[0, 1, 2]");
  EXPECT_FAILS(from_block_lists(TensorView{}, counts, g, good), kType, "indices");
}

TEST(CheckBitsTest, NamesWhatDoesNotFit) {
  const Array dense(DType::kUInt8, {2, 5}), flat(DType::kUInt8, {9});
  const int64_t equal[] = {5, 5}, unequal[] = {5, 4};
  EXPECT_NO_THROW(check_bits(dense, TensorView{}, 2, equal, "symbols.cache"));
  EXPECT_NO_THROW(check_bits(dense, TensorView{}, 2, unequal, "symbols.cache"));
  EXPECT_NO_THROW(check_bits(TensorView{}, TensorView{}, 2, equal, "symbols.cache"));
  const Array good = Array::ints({0, 5, 9}), swapped = Array::ints({0, 4, 9}), far = Array::ints({0, 5, 10});
  EXPECT_NO_THROW(check_bits(flat, good, 2, unequal, "symbols.cache"));
  EXPECT_FAILS(check_bits(flat, swapped, 2, unequal, "symbols.cache"), kValue, "symbols.cache");
  EXPECT_FAILS(check_bits(flat, far, 2, unequal, "symbols.cache"), kValue, "symbols.cache_indptr");
  EXPECT_FAILS(check_bits(flat, Array::ints({0, 9}), 2, unequal, "symbols.cache"), kValue,
               "symbols.cache_indptr");
  EXPECT_FAILS(check_bits(TensorView{}, good, 2, unequal, "symbols.cache"), kValue, "symbols.cache_indptr");
  EXPECT_FAILS(check_bits(dense, TensorView{}, 3, equal, "symbols.cache"), kValue, "symbols.cache");
  EXPECT_FAILS(check_bits(flat, TensorView{}, 2, equal, "symbols.cache"), kValue, "symbols.cache");
  const int64_t longer[] = {5, 6};
  EXPECT_FAILS(check_bits(dense, TensorView{}, 2, longer, "symbols.cache"), kValue, "symbols.cache");
}

}  // namespace
}  // namespace flashomni
