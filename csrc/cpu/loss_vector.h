// AVX-512 pieces that the loss kernels share. Include only after `#pragma GCC target` has switched AVX-512 on.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ntpseg::avx512 {

// exp by range reduction and Cephes' polynomial, within 2 ulp; below -104 it gives 0, and not-a-number stays.
// Of huge numbers the reduction leaves a remainder of any size and sign, so they are cut off above too.
static inline __m512 exp_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // the second operand is what max and min return beside not-a-number
  x = _mm512_min_ps(_mm512_set1_ps(200.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0x08);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// Running maximum, its column and the sum of exponentials of one row, spread over 16 lanes.
struct Lanes {
  __m512 row_max, row_sum;
  __m512i argmax;
};

static inline Lanes empty_lanes() {
  return {_mm512_set1_ps(-__builtin_inff()), _mm512_setzero_ps(), _mm512_setzero_si512()};
}

// Takes 16 gaps whose first column is `column` into the lanes and returns their exponentials; masked ones are left out.
static inline __m512 take(Lanes& lanes, __m512 gap, int32_t column, __mmask16 mask) {
  const __m512i columns = _mm512_add_epi32(
      _mm512_set1_epi32(column), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  const __mmask16 higher = _mm512_mask_cmp_ps_mask(mask, gap, lanes.row_max, _CMP_GT_OQ);  // strictly: the first stays
  lanes.row_max = _mm512_mask_mov_ps(lanes.row_max, higher, gap);
  lanes.argmax = _mm512_mask_mov_epi32(lanes.argmax, higher, columns);
  const __m512 e = exp_ps(gap);
  lanes.row_sum = _mm512_mask_add_ps(lanes.row_sum, mask, lanes.row_sum, e);
  return e;
}

// Folds the lanes into a row's running state; a maximum that is only equalled stays where it was.
static inline void fold(const Lanes& lanes, float& row_max, int64_t& argmax, float& row_sum) {
  row_sum += _mm512_reduce_add_ps(lanes.row_sum);
  const float highest = _mm512_reduce_max_ps(lanes.row_max);
  if (highest > row_max) {
    const __mmask16 equal = _mm512_cmp_ps_mask(lanes.row_max, _mm512_set1_ps(highest), _CMP_EQ_OQ);
    row_max = highest;
    argmax = _mm512_mask_reduce_min_epi32(equal, lanes.argmax);
  }
}

}  // namespace ntpseg::avx512
