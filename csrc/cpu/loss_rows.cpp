// What the processor allows the loss, and the choice among the instruction sets.
#include "loss.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace ntpseg {

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static bool has_amx() {
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool tiles = (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  eax = 7, ecx = 1;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool bf16 = eax >> 5 & 1;  // AVX512-BF16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return tiles && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

ExponentialsRow exponentials_row_for_this_cpu() {
  const char* asked = std::getenv("NTPSEG_CPU_ISA");  // at every call, as for the ranking
  const std::string_view limit = asked ? asked : "avx512";
  __builtin_cpu_init();
  if (limit == "avx512" && has_avx512()) return avx512::exponentials_row;
  if (limit != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::exponentials_row;
  }
  return nullptr;
}

int loss_level() {
  const ExponentialsRow row = exponentials_row_for_this_cpu();
  if (row != avx512::exponentials_row) return row != nullptr;
  static const bool amx = has_amx();
  return amx ? 2 : 1;
}

}  // namespace ntpseg
#else
namespace ntpseg {
ExponentialsRow exponentials_row_for_this_cpu() { return nullptr; }
int loss_level() { return 0; }
}  // namespace ntpseg
#endif
