// Errors and tensor views.
#include "flashomni/tensor.h"

#include "tests/cpp/support.h"

namespace flashomni {
namespace {

using testing::decode;
using testing::encode;

// DLPack's structs, by layout only: the header needs no dlpack.h.
struct Dl {
  void* data;
  struct {
    int device_type;
    int32_t device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

TEST(ErrorTest, KindsHavePythonNames) {
  EXPECT_STREQ(Error(ErrorKind::kValue, "").kind_name(), "ValueError");
  EXPECT_STREQ(Error(ErrorKind::kType, "").kind_name(), "TypeError");
  EXPECT_STREQ(Error(ErrorKind::kNotImplemented, "").kind_name(), "NotImplementedError");
  EXPECT_STREQ(Error(ErrorKind::kRuntime, "").kind_name(), "RuntimeError");
}

TEST(ErrorTest, FailNamesArgumentExpectedAndGot) {
  try {
    fail(ErrorKind::kType, "q", "float16", "int32[3]");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "q: expected float16, got int32[3]");
    EXPECT_EQ(error.kind(), ErrorKind::kType);
  }
}

TEST(TensorTest, MakeViewIsCompact) {
  float data[24];
  const TensorView view = make_view(data, DType::kFloat32, {2, 3, 4});
  EXPECT_TRUE(view.present());
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(view.strides, (std::array<int64_t, 4>{12, 4, 1, 0}));
  EXPECT_EQ(describe(view), "float32[2, 3, 4]");
  EXPECT_EQ(describe(make_view(data, DType::kUInt8, {})), "uint8[]");
  EXPECT_EQ(describe(TensorView{}), "nothing");
  EXPECT_FALSE(TensorView{}.present());
  EXPECT_FAILS(make_view(data, DType::kFloat32, {1, 1, 1, 1, 1}), kValue, "shape");
}

TEST(TensorTest, NamesAndSizes) {
  EXPECT_EQ(bytes_of(DType::kFloat32), 4);
  EXPECT_EQ(bytes_of(DType::kInt32), 4);
  EXPECT_EQ(bytes_of(DType::kBFloat16), 2);
  EXPECT_EQ(bytes_of(DType::kFloat16), 2);
  EXPECT_EQ(bytes_of(DType::kUInt8), 1);
  EXPECT_STREQ(name_of(DType::kBFloat16), "bfloat16");
  EXPECT_EQ(name_of(Device{}), "cpu");
  EXPECT_EQ(name_of(Device{DeviceType::kCUDA, 3}), "cuda:3");
}

TEST(DlpackTest, TakesOverEveryKnownType) {
  const struct {
    uint8_t code, bits;
    DType dtype;
  } known[] = {{2, 32, DType::kFloat32},
               {2, 16, DType::kFloat16},
               {4, 16, DType::kBFloat16},
               {1, 8, DType::kUInt8},
               {0, 32, DType::kInt32}};
  char data[64];
  int64_t shape[] = {2, 3};
  for (const auto& k : known) {
    const Dl dl{data, {1, 0}, 2, {k.code, k.bits, 1}, shape, nullptr, 4};
    const TensorView view = from_dlpack(dl, "x");
    EXPECT_EQ(view.dtype, k.dtype);
    EXPECT_EQ(view.data, data + 4);
    EXPECT_EQ(view.ndim, 2);
    EXPECT_EQ(view.strides[0], 3);
    EXPECT_EQ(view.strides[1], 1);
  }
}

TEST(DlpackTest, KeepsStridesAndDevice) {
  char data[64];
  int64_t shape[] = {2, 3}, strides[] = {1, -7};
  Dl dl{data, {2, 5}, 2, {2, 32, 1}, shape, strides, 0};
  const TensorView view = from_dlpack(dl, "x");
  EXPECT_EQ(view.strides[0], 1);
  EXPECT_EQ(view.strides[1], -7);
  EXPECT_EQ(view.device, (Device{DeviceType::kCUDA, 5}));
  dl.device = {1, 5};
  EXPECT_EQ(from_dlpack(dl, "x").device, Device{});
  dl.data = nullptr;
  dl.byte_offset = 8;
  EXPECT_EQ(from_dlpack(dl, "x").data, nullptr);
}

TEST(DlpackTest, RefusesTheUnknown) {
  char data[64];
  int64_t shape[] = {1, 1, 1, 1, 1}, negative[] = {-1};
  const Dl good{data, {1, 0}, 1, {2, 32, 1}, shape, nullptr, 0};
  Dl dl = good;
  dl.dtype = {2, 64, 1};
  EXPECT_FAILS(from_dlpack(dl, "weight"), kType, "weight");
  dl.dtype = {6, 8, 1};
  EXPECT_FAILS(from_dlpack(dl, "weight"), kType, "weight");
  dl.dtype = {2, 32, 4};
  EXPECT_FAILS(from_dlpack(dl, "weight"), kType, "weight");
  dl.dtype = {99, 32, 1};
  EXPECT_FAILS(from_dlpack(dl, "weight"), kType, "weight");
  dl = good;
  dl.device.device_type = 8;
  EXPECT_FAILS(from_dlpack(dl, "weight"), kType, "weight");
  dl = good;
  dl.ndim = 5;
  EXPECT_FAILS(from_dlpack(dl, "weight"), kValue, "weight");
  dl = good;
  dl.shape = negative;
  EXPECT_FAILS(from_dlpack(dl, "weight"), kValue, "weight");
}

// The tests' own conversions, on which every comparison rests.
TEST(SupportTest, EncodeAndDecodeAgree) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const double value = decode(dtype, bits);
      if (std::isnan(value) || std::isinf(value)) continue;
      ASSERT_EQ(encode(dtype, value), bits) << name_of(dtype);
    }
  }
  EXPECT_EQ(decode(DType::kFloat16, encode(DType::kFloat16, 1.0 + std::ldexp(1, -11))), 1.0);
  EXPECT_EQ(decode(DType::kFloat16, encode(DType::kFloat16, 1.0 + 3 * std::ldexp(1, -11))),
            1.0 + std::ldexp(1, -9));
  EXPECT_EQ(decode(DType::kFloat16, encode(DType::kFloat16, 4095.9)), 4096.0);
}

}  // namespace
}  // namespace flashomni
