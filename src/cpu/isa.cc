// Which instruction set's kernels run: the best that the chip has, or the one that FLASHOMNI_CPU_ISA names.
#include <cstdlib>
#include <cstring>

#include "flashomni/backend.h"
#include "flashomni/error.h"
#include "src/cpu/kernels.h"

namespace flashomni {
namespace cpu {
namespace {

struct Candidate {
  const KernelTable* table;
  bool (*available)();
  bool (*fast)();  // whether it beats the next one here; FLASHOMNI_CPU_ISA asks only whether it is available
};

bool always() {
  return true;
}
#if defined(FLASHOMNI_CPU_HAS_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
// Intel's cores with AMX issue a bfloat16 dot product too seldom: 163 ms of attention against 115 ms with
// float32 products, both in bfloat16 storage (4,112 tokens, 4 heads of 64, 2 threads).
bool has_fast_dot_products() {
  return !__builtin_cpu_is("intel");
}
#endif

// Best first.
const Candidate kCandidates[] = {
#if defined(FLASHOMNI_CPU_HAS_X86)
    {&avx512bf16_kernels, has_avx512bf16, has_fast_dot_products},
    {&avx512_kernels, has_avx512, always},
    {&avx2_kernels, has_avx2, always},
#endif
    {&generic_kernels, always, always},
};

}  // namespace

const KernelTable& kernels() {
  // Read at every call, as FLASHOMNI_BACKEND is: a test may change it.
  const char* forced = std::getenv("FLASHOMNI_CPU_ISA");
  std::string names;
  for (const Candidate& candidate : kCandidates) {
    const char* name = candidate.table->isa;
    if (forced == nullptr || *forced == '\0') {
      if (candidate.available() && candidate.fast()) return *candidate.table;
    } else if (std::strcmp(forced, name) == 0) {
      if (candidate.available()) return *candidate.table;
      fail(ErrorKind::kValue, "FLASHOMNI_CPU_ISA", "an instruction set that this chip has", name);
    }
    if (candidate.available()) names += text(names.empty() ? "" : ", ", name);
  }
  fail(ErrorKind::kValue, "FLASHOMNI_CPU_ISA", text("one of ", names), forced);
}

}  // namespace cpu

const char* cpu_isa() {
  return cpu::kernels().isa;
}

}  // namespace flashomni
