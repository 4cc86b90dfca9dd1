// Merging a block's ranked entries into one sample's row of the memory.
#pragma once

#include <cstdint>

#include "select.cuh"
#include "topn.h"

namespace ntpseg {

// What the row held comes first, what the batch brings after it.
struct MergeShared {
  uint32_t key[2 * kMaxN];
  int position[2 * kMaxN], token[2 * kMaxN];
  int dropped[2 * kMaxN];
  int held;
};

__device__ __forceinline__ bool precedes(const MergeShared& s, int i, int j) {
  if (s.key[i] != s.key[j]) return s.key[i] > s.key[j];
  if (s.position[i] != s.position[j]) return s.position[i] < s.position[j];
  return s.token[i] < s.token[j];
}

// The fresh entries lie at shared.{key, position, token}[kMaxN ..]; `fresh` is how many. The lock makes visits of one
// sample by several blocks take turns; in whichever order they come, the outcome is the same. Rows are read and
// written past the first-level cache, which other multiprocessors do not see.
template <int kThreads>
__device__ void merge_row(const RecordArguments& a, MergeShared& shared, int64_t sample, int fresh) {
  const int64_t epoch = *a.epoch;
  const int64_t slot = (epoch & 1) * a.samples + sample;
  int32_t* row = a.memory + slot * 3 * a.n;
  int32_t* lock = a.control + 1 + sample % a.locks;
  if (threadIdx.x == 0) {
    while (atomicCAS(lock, 0, 1) != 0) __nanosleep(64);
    __threadfence();
    shared.held = 0;
  }
  __syncthreads();

  if (__ldcg(a.stamp + slot) == static_cast<int32_t>(epoch)) {
    for (int i = threadIdx.x; i < a.n; i += kThreads) {
      const int position = __ldcg(row + a.n + i);
      if (position < 0) continue;
      shared.key[i] = key_of(__int_as_float(__ldcg(row + i)));
      shared.position[i] = position;
      shared.token[i] = __ldcg(row + 2 * a.n + i);
      atomicMax(&shared.held, i + 1);
    }
  }
  __syncthreads();
  const int held = shared.held, total = held + fresh;

  // Entry e of the two lists together is at index e, or in the second half.
  const auto at = [held](int e) { return e < held ? e : kMaxN + e - held; };
  for (int e = threadIdx.x; e < total; e += kThreads) {
    const int i = at(e);
    const int first = e < held ? kMaxN : 0, count = e < held ? fresh : held;
    int dropped = 0;
    for (int j = first; j < first + count; ++j) {
      const bool equal = shared.position[j] == shared.position[i] && shared.token[j] == shared.token[i];
      dropped |= equal && (shared.key[j] > shared.key[i] || (shared.key[j] == shared.key[i] && j < i));
    }
    shared.dropped[i] = dropped;
  }
  __syncthreads();
  int kept = 0;
  for (int e = threadIdx.x; e < (total + kThreads - 1) / kThreads * kThreads; e += kThreads) {
    int place = a.n;
    if (e < total && !shared.dropped[at(e)]) {
      place = 0;
      for (int f = 0; f < total; ++f) place += !shared.dropped[at(f)] && precedes(shared, at(f), at(e));
    }
    if (place < a.n) {
      __stcg(row + place, __float_as_int(value_of(shared.key[at(e)])));
      __stcg(row + a.n + place, shared.position[at(e)]);
      __stcg(row + 2 * a.n + place, shared.token[at(e)]);
    }
    kept += __syncthreads_count(e < total && !shared.dropped[at(min(e, max(total - 1, 0)))]);
  }
  for (int i = kept + threadIdx.x; i < a.n; i += kThreads) {
    __stcg(row + i, __float_as_int(-INFINITY));
    __stcg(row + a.n + i, -1);
    __stcg(row + 2 * a.n + i, -1);
  }
  if (threadIdx.x == 0) __stcg(a.stamp + slot, static_cast<int32_t>(epoch));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(lock, 0);
}

}  // namespace ntpseg
