// The ranking for any processor, and the choice among the instruction sets.
#include "rank.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>

namespace ntpseg {
namespace baseline {

constexpr int64_t kWidth = 4;

static inline int key_mask(const float* deviation, const uint8_t* is_error, int32_t threshold, int32_t* keys) {
  int mask = 0;
  for (int i = 0; i < kWidth; ++i) {
    const float value = std::isnan(deviation[i]) ? std::numeric_limits<float>::infinity() : deviation[i] + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    keys[i] = bits ^ ((bits >> 31) & 0x7fffffff);
    mask |= (is_error[i] != 0 && keys[i] > threshold) << i;
  }
  return mask;
}

static inline int above(const int32_t* key, int32_t threshold) {
  int mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= (key[i] > threshold) << i;
  return mask;
}

static inline int equal(const int32_t* key, int32_t value) {
  int mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= (key[i] == value) << i;
  return mask;
}

static inline void compress(int32_t* out, const int32_t* in, int mask) {
  for (; mask; mask &= mask - 1) *out++ = in[__builtin_ctz(mask)];
}

static inline void compress_columns(int32_t* out, int32_t first, int mask) {
  for (; mask; mask &= mask - 1) *out++ = first + __builtin_ctz(mask);
}

#include "rank_impl.h"

}  // namespace baseline

RankRow rank_row_for_this_cpu() {
#if defined(__x86_64__)
  // Read at every call, which costs nothing beside the ranking, so that one process can compare them.
  const char* asked = std::getenv("NTPSEG_CPU_ISA");
  const std::string_view limit = asked ? asked : "avx512";
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (limit == "avx512" && has_avx512) return avx512::rank_row;
  if (limit != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return avx2::rank_row;
#endif
  return baseline::rank_row;
}

}  // namespace ntpseg
