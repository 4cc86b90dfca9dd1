// Ranking the errors of one row: the interface between the instruction sets and the operators. No torch headers.
#pragma once

#include <cstdint>
#include <vector>

namespace ntpseg {

// Working memory of one thread, kept from row to row.
struct Scratch {
  std::vector<int32_t> key, column, order;
  std::vector<uint64_t> pairs;
  std::vector<uint8_t> is_error;
};

// Writes the min(n, errors) largest deviations among the errors in descending order, ties to the lowest column, and
// returns how many there are. NaN counts as +inf. value and index have room for n.
using RankRow = int64_t (*)(
    const float* deviation,
    const uint8_t* is_error,
    int64_t length,
    int64_t n,
    Scratch& scratch,
    float* value,
    int32_t* index);

namespace avx512 {
int64_t rank_row(const float*, const uint8_t*, int64_t, int64_t, Scratch&, float*, int32_t*);
}
namespace avx2 {
int64_t rank_row(const float*, const uint8_t*, int64_t, int64_t, Scratch&, float*, int32_t*);
}
namespace baseline {
int64_t rank_row(const float*, const uint8_t*, int64_t, int64_t, Scratch&, float*, int32_t*);
}

// The best of them for this processor. NTPSEG_CPU_ISA=baseline|avx2|avx512 asks for one that it also has.
RankRow rank_row_for_this_cpu();

}  // namespace ntpseg
