// The ranking for processors with AVX-512.
#include "rank.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

// After the headers: an inline function of theirs, compiled for AVX-512, must not become the program's only copy.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,popcnt,bmi,bmi2")

namespace ntpseg::avx512 {

constexpr int64_t kWidth = 16;

static inline int key_mask(const float* deviation, const uint8_t* is_error, int32_t threshold, int32_t* keys) {
  const __m128i flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(is_error));
  const __mmask16 errors = _mm_test_epi8_mask(flags, flags);
  if (errors == 0) return 0;
  __m512 value = _mm512_add_ps(_mm512_loadu_ps(deviation), _mm512_setzero_ps());  // -0 becomes +0
  value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_inff()));
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
  const __m512i key = _mm512_xor_si512(bits, flip);
  _mm512_storeu_si512(keys, key);
  return _mm512_mask_cmpgt_epi32_mask(errors, key, _mm512_set1_epi32(threshold));
}

static inline int above(const int32_t* key, int32_t threshold) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(key), _mm512_set1_epi32(threshold));
}

static inline int equal(const int32_t* key, int32_t value) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(key), _mm512_set1_epi32(value));
}

static inline void compress(int32_t* out, const int32_t* in, int mask) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(in)));
}

static inline void compress_columns(int32_t* out, int32_t first, int mask) {
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i column = _mm512_add_epi32(_mm512_set1_epi32(first), step);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), column));
}

#include "rank_impl.h"

}  // namespace ntpseg::avx512
#endif
