// The pass over a tile of float32 logits, and what the processor allows.
#include "loss.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

// After the headers: an inline function of theirs, compiled for AVX-512, must not become the program's only copy.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")

#include "loss_vector.h"

namespace ntpseg {

static int detect() {
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))) {
    return 0;
  }
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool tiles = (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  eax = 7, ecx = 1;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool bf16 = eax >> 5 & 1;  // AVX512-BF16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return tiles && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 2 : 1;
}

int loss_level() {
  static const int level = detect();
  return level;
}

void exponentials_row(
    float* z, int64_t length, float anchor, int32_t column, float& top, int64_t& best, float& total) {
  avx512::Lanes lanes = avx512::empty_lanes();
  const __m512 anchors = _mm512_set1_ps(anchor);
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) {
    const __m512 gap = _mm512_sub_ps(_mm512_loadu_ps(z + i), anchors);
    _mm512_storeu_ps(z + i, avx512::take(lanes, gap, column + static_cast<int32_t>(i), 0xffff));
  }
  if (i < length) {
    const __mmask16 mask = static_cast<__mmask16>((1u << (length - i)) - 1);
    const __m512 gap = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, z + i), anchors);
    _mm512_mask_storeu_ps(z + i, mask, avx512::take(lanes, gap, column + static_cast<int32_t>(i), mask));
  }
  avx512::fold(lanes, top, best, total);
}

}  // namespace ntpseg
#else
namespace ntpseg {
int loss_level() { return 0; }
void exponentials_row(float*, int64_t, float, int32_t, float&, int64_t&, float&) {}
}  // namespace ntpseg
#endif
