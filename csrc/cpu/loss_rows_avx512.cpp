// The pass over a tile of float32 logits for processors with AVX-512.
#include "loss.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the headers: an inline function of theirs, compiled for AVX-512, must not become the program's only copy.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")

#include "loss_vector.h"

namespace ntpseg::avx512 {

void exponentials_row(
    float* z, int64_t length, float anchor, int32_t column, float& row_max, int64_t& argmax, float& row_sum) {
  Lanes lanes = empty_lanes();
  const __m512 anchors = _mm512_set1_ps(anchor);
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) {
    const __m512 gap = _mm512_sub_ps(_mm512_loadu_ps(z + i), anchors);
    _mm512_storeu_ps(z + i, take(lanes, gap, column + static_cast<int32_t>(i), 0xffff));
  }
  if (i < length) {
    const __mmask16 mask = static_cast<__mmask16>((1u << (length - i)) - 1);
    const __m512 gap = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, z + i), anchors);
    _mm512_mask_storeu_ps(z + i, mask, take(lanes, gap, column + static_cast<int32_t>(i), mask));
  }
  fold(lanes, row_max, argmax, row_sum);
}

}  // namespace ntpseg::avx512
#endif
