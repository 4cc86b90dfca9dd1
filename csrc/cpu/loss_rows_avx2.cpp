// The pass over a tile of float32 logits for processors with AVX2 and FMA.
#include "loss.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the headers: an inline function of theirs, compiled for AVX2, must not become the program's only copy.
#pragma GCC target("avx2,fma")

namespace ntpseg::avx2 {

// 2^n for n in [-126, 127].
static inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// As in loss_vector.h, but scaled in two halves: neither leaves the range of an exponent before the result does.
static inline __m256 exp_ps(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-110.0f), x);  // the second operand is what max and min return beside not-a-number
  x = _mm256_min_ps(_mm256_set1_ps(130.0f), x);
  const __m256 n = _mm256_round_ps(
      _mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(p, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

void exponentials_row(
    float* z, int64_t length, float anchor, int32_t column, float& row_max, int64_t& argmax, float& row_sum) {
  const __m256 anchors = _mm256_set1_ps(anchor), nothing = _mm256_set1_ps(-__builtin_inff());
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256 max_lanes = nothing, sum_lanes = _mm256_setzero_ps();
  __m256i argmax_lanes = _mm256_setzero_si256(), columns = _mm256_add_epi32(_mm256_set1_epi32(column), lane);
  const auto take = [&](__m256 gap) {
    const __m256 higher = _mm256_cmp_ps(gap, max_lanes, _CMP_GT_OQ);  // strictly: the first stays
    max_lanes = _mm256_blendv_ps(max_lanes, gap, higher);
    argmax_lanes = _mm256_blendv_epi8(argmax_lanes, columns, _mm256_castps_si256(higher));
    columns = _mm256_add_epi32(columns, _mm256_set1_epi32(8));
    const __m256 e = exp_ps(gap);
    sum_lanes = _mm256_add_ps(sum_lanes, e);
    return e;
  };
  int64_t i = 0;
  for (; i + 8 <= length; i += 8) _mm256_storeu_ps(z + i, take(_mm256_sub_ps(_mm256_loadu_ps(z + i), anchors)));
  if (i < length) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(length - i)), lane);
    const __m256 gap = _mm256_sub_ps(_mm256_maskload_ps(z + i, mask), anchors);
    _mm256_maskstore_ps(z + i, mask, take(_mm256_blendv_ps(nothing, gap, _mm256_castsi256_ps(mask))));
  }

  alignas(32) float max_of[8], sum_of[8];
  alignas(32) int32_t argmax_of[8];
  _mm256_store_ps(max_of, max_lanes);
  _mm256_store_ps(sum_of, sum_lanes);
  _mm256_store_si256(reinterpret_cast<__m256i*>(argmax_of), argmax_lanes);
  row_sum += ((sum_of[0] + sum_of[4]) + (sum_of[1] + sum_of[5])) +
      ((sum_of[2] + sum_of[6]) + (sum_of[3] + sum_of[7]));
  int first = 0;
  for (int l = 1; l < 8; ++l) {
    if (max_of[l] > max_of[first] || (max_of[l] == max_of[first] && argmax_of[l] < argmax_of[first])) first = l;
  }
  if (max_of[first] > row_max) {  // a maximum that is only equalled stays where it was
    row_max = max_of[first];
    argmax = argmax_of[first];
  }
}

}  // namespace ntpseg::avx2
#endif
