// Merging ranked entries into the memory's rows. No torch headers.
#pragma once

#include <cstdint>
#include <vector>

namespace ntpseg {

// Entries of one sample in ranking order: deviation descending, then position, then token.
struct Entries {
  explicit Entries(int64_t n) : deviation(n), position(n), token(n) {}
  std::vector<float> deviation;
  std::vector<int32_t> position, token;
  int64_t size = 0;
};

// The memory's tensors; ntpseg/ops/record.py describes them.
struct MemoryView {
  int32_t* rows;     // [2, samples, 3, n]
  int32_t* stamp;    // [2, samples]
  int32_t* control;  // [1 + locks]
  int64_t locks, samples, n, epoch;
};

// Reads entries laid out as the memory's rows are: n deviations, n positions, n tokens, position -1 past the last.
Entries read_entries(const int32_t* row, int64_t n);

// Merges under the sample's lock; entries of a sample that another thread merges too may arrive in any order, since
// the outcome does not depend on it. An id out of range is counted in control[0] and skipped.
void merge_into(const MemoryView& memory, int64_t sample, const Entries& fresh);

}  // namespace ntpseg
