// wgmma m64nNk16 with fp32 accumulators, for the N that the kernels use, and its shared-memory descriptors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashomni::cuda::ptx_ops {

__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Pins registers at this point of the program, so that no arithmetic on an accumulator moves across a wait.
template <int kCount>
__device__ inline void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kRows, int kColumns>
__device__ inline void pin(uint32_t (&registers)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
}

/// A copy that ptxas can neither drop nor merge: merged, it would write registers that a product in flight
/// still reads, and ptxas would serialise every wgmma of the kernel (C7513).
template <int kRows, int kColumns>
__device__ inline void move_registers(uint32_t (&to)[kRows][kColumns],
                                      const uint32_t (&from)[kRows][kColumns]) {
  uint32_t identity;
  asm volatile("mov.b32 %0, 0x3210;" : "=r"(identity));
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      asm volatile("prmt.b32 %0, %1, %1, %2;" : "=r"(to[i][j]) : "r"(from[i][j]), "r"(identity));
}

// Every operand lies in 128-byte swizzled panels: [columns / 64][rows][64], 8 rows of 128 bytes an atom of
// 1 KB. kReduction: the reduction runs along the 64 columns; kMN: along the rows, and the next panel is
// `panel_bytes` on. A descriptor is kept as its low word, which alone moves: bytes >> 4 are added to it.
enum class Major : int { kReduction = 0, kMN = 1 };

__device__ inline uint32_t descriptor_reduction_major(uint32_t address) {
  return address >> 4 | 1u << 16;
}
__device__ inline uint32_t descriptor_mn_major(uint32_t address, uint32_t panel_bytes) {
  return address >> 4 | panel_bytes >> 4 << 16;
}
__device__ inline uint64_t descriptor(uint32_t low) {
  constexpr uint32_t swizzle_128b = 1u << 30, stride_between_atoms = 1024 >> 4;
  return uint64_t(swizzle_128b | stride_between_atoms) << 32 | low;
}

/// d += a b for 64 rows and N columns; ss: a from shared memory, rs: a from registers.
template <class Element, int kN, Major kB>
struct Wgmma;

// clang-format off
#define FO_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define FO_LIST_32 FO_TEN() FO_TEN(1) FO_TEN(2) "%30,%31"
#define FO_LIST_48 FO_TEN() FO_TEN(1) FO_TEN(2) FO_TEN(3) "%40,%41,%42,%43,%44,%45,%46,%47"
#define FO_LIST_64 FO_TEN() FO_TEN(1) FO_TEN(2) FO_TEN(3) FO_TEN(4) FO_TEN(5) "%60,%61,%62,%63"
#define FO_LIST_128                                                                                      \
  FO_TEN() FO_TEN(1) FO_TEN(2) FO_TEN(3) FO_TEN(4) FO_TEN(5) FO_TEN(6) FO_TEN(7) FO_TEN(8) FO_TEN(9)     \
  FO_TEN(10) FO_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
#define FO_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FO_F16(i) FO_F4(i), FO_F4(i + 4), FO_F4(i + 8), FO_F4(i + 12)
#define FO_F32(i) FO_F16(i), FO_F16(i + 16)
#define FO_F48(i) FO_F32(i), FO_F16(i + 32)
#define FO_F64(i) FO_F32(i), FO_F32(i + 32)
#define FO_F128(i) FO_F64(i), FO_F64(i + 64)

// r0..r6: the numbers of the operands that follow the accumulators.
#define FO_WGMMA(ELEMENT, TYPE, N, REGS, r0, r1, r2, r3, r4, r5, r6)                                       \
  template <Major kB> struct Wgmma<ELEMENT, N, kB> {                                                       \
    __device__ static void ss(float (&d)[REGS], uint64_t a, uint64_t b, bool accumulate) {                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r2 ", 0;\n"                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FO_LIST_##REGS "}, " \
                   "%" #r0 ", %" #r1 ", p, 1, 1, 0, %" #r3 ";\n}"                                          \
                   : FO_F##REGS(0)                                                                         \
                   : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kB)));                                  \
    }                                                                                                      \
    __device__ static void rs(float (&d)[REGS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r5 ", 0;\n"                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FO_LIST_##REGS "}, " \
                   "{%" #r0 ",%" #r1 ",%" #r2 ",%" #r3 "}, %" #r4 ", p, 1, 1, %" #r6 ";\n}"                \
                   : FO_F##REGS(0)                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB))); \
    }                                                                                                      \
  };
#define FO_WGMMA_SIZES(ELEMENT, TYPE)                                 \
  FO_WGMMA(ELEMENT, TYPE, 64, 32, 32, 33, 34, 35, 36, 37, 38)          \
  FO_WGMMA(ELEMENT, TYPE, 96, 48, 48, 49, 50, 51, 52, 53, 54)          \
  FO_WGMMA(ELEMENT, TYPE, 128, 64, 64, 65, 66, 67, 68, 69, 70)         \
  FO_WGMMA(ELEMENT, TYPE, 256, 128, 128, 129, 130, 131, 132, 133, 134)

FO_WGMMA_SIZES(__nv_bfloat16, "bf16")
FO_WGMMA_SIZES(__half, "f16")

#undef FO_WGMMA_SIZES
#undef FO_WGMMA
#undef FO_TEN
#undef FO_LIST_32
#undef FO_LIST_48
#undef FO_LIST_64
#undef FO_LIST_128
#undef FO_F4
#undef FO_F16
#undef FO_F32
#undef FO_F48
#undef FO_F64
#undef FO_F128
// clang-format on

}  // namespace flashomni::cuda::ptx_ops
