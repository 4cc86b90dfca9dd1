// The ranking for processors with AVX2.
#include "rank.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

// After the headers: an inline function of theirs, compiled for AVX2, must not become the program's only copy.
#pragma GCC target("avx2,popcnt,bmi,bmi2")

namespace ntpseg::avx2 {

constexpr int64_t kWidth = 8;

// AVX2 has no compress: for each mask, the permutation that brings its lanes to the front.
static constexpr auto kPack = [] {
  std::array<std::array<int32_t, 8>, 256> table{};
  for (int mask = 0; mask < 256; ++mask) {
    int size = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) table[mask][size++] = lane;
    }
  }
  return table;
}();

static inline __m256i load(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }

static inline int lanes(__m256i compared) { return _mm256_movemask_ps(_mm256_castsi256_ps(compared)); }

static inline int key_mask(const float* deviation, const uint8_t* is_error, int32_t threshold, int32_t* keys) {
  const __m256i flags = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(is_error)));
  const __m256i errors = _mm256_cmpgt_epi32(flags, _mm256_setzero_si256());
  if (_mm256_testz_si256(errors, errors)) return 0;
  __m256 value = _mm256_add_ps(_mm256_loadu_ps(deviation), _mm256_setzero_ps());  // -0 becomes +0
  value = _mm256_blendv_ps(value, _mm256_set1_ps(__builtin_inff()), _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i flip = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(0x7fffffff));
  const __m256i key = _mm256_xor_si256(bits, flip);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys), key);
  return lanes(_mm256_and_si256(errors, _mm256_cmpgt_epi32(key, _mm256_set1_epi32(threshold))));
}

static inline int above(const int32_t* key, int32_t threshold) {
  return lanes(_mm256_cmpgt_epi32(load(key), _mm256_set1_epi32(threshold)));
}

static inline int equal(const int32_t* key, int32_t value) {
  return lanes(_mm256_cmpeq_epi32(load(key), _mm256_set1_epi32(value)));
}

static inline void pack(int32_t* out, __m256i lanes, int mask) {
  const __m256i packed = _mm256_permutevar8x32_epi32(lanes, load(kPack[mask].data()));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
}

static inline void compress(int32_t* out, const int32_t* in, int mask) { pack(out, load(in), mask); }

static inline void compress_columns(int32_t* out, int32_t first, int mask) {
  const __m256i step = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  pack(out, _mm256_add_epi32(_mm256_set1_epi32(first), step), mask);
}

#include "rank_impl.h"

}  // namespace ntpseg::avx2
#endif
