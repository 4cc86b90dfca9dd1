// Merging a block's ranked entries into one sample's row of the memory.
#pragma once

#include <cstdint>

#include "select.cuh"
#include "topn.h"

namespace ntpseg {

// What the row held comes first, what the batch brings after it; both are ranked.
struct MergeShared {
  uint32_t key[2 * kMaxN];
  int position[2 * kMaxN], token[2 * kMaxN];
  int merged[2 * kMaxN];                // place among all entries, before any is dropped
  uint32_t dropped[2 * kMaxN / 32 + 1];  // a bit per such place
};

__device__ __forceinline__ bool precedes(const MergeShared& s, int i, int j) {
  if (s.key[i] != s.key[j]) return s.key[i] > s.key[j];
  if (s.position[i] != s.position[j]) return s.position[i] < s.position[j];
  return s.token[i] < s.token[j];
}

// How many entries of the other list come before entry i; what was held comes before its equal.
__device__ __forceinline__ int count_before(const MergeShared& shared, int i, int held, int fresh) {
  const bool is_held = i < kMaxN;
  const int first = is_held ? kMaxN : 0;
  int low = first, high = first + (is_held ? fresh : held);
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high) / 2;
    const bool before = is_held ? precedes(shared, middle, i) : !precedes(shared, i, middle);
    low = before ? middle + 1 : low;
    high = before ? high : middle;
  }
  return low - first;
}

// The fresh entries lie at shared.{key, position, token}[kMaxN ..]; `fresh` is how many, and each position at most
// once. rank_at has room for a.length bytes. The lock makes visits of one sample by several blocks take turns; in
// whichever order they come, the outcome is the same. Rows are read and written past the first-level cache, which
// other multiprocessors do not see. No loop is unrolled: each turns once or twice, and its copies would all be fetched.
template <int kThreads>
__device__ void merge_row(
    const RecordArguments& a, MergeShared& shared, uint8_t* rank_at, int64_t sample, int epoch, int fresh) {
  static_assert(kMaxN <= 256, "ranks are kept in bytes");
  const int64_t slot = (epoch & 1) * a.samples + sample;
  int32_t* row = a.memory + slot * 3 * a.n;
  // The low word is enough to spread samples over the locks, and a 64-bit remainder is slow.
  int32_t* lock = a.control + 1 + static_cast<uint32_t>(sample) % static_cast<uint32_t>(a.locks);
  // Positions without a fresh entry keep whatever their byte was: who reads one looks whether it names its position.
#pragma unroll 1
  for (int i = threadIdx.x; i < fresh; i += kThreads) rank_at[shared.position[kMaxN + i]] = static_cast<uint8_t>(i);
  if (threadIdx.x < 2 * kMaxN / 32 + 1) shared.dropped[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    while (atomicCAS(lock, 0, 1) != 0) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();

  int held = 0;
#pragma unroll 1
  for (int base = 0; base < a.n; base += kThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    int position = -1;
    if (i < a.n) {
      // Reading a row that turns out to be another epoch's costs less than waiting for the stamp first.
      const int stamp = __ldcg(a.stamp + slot), bits = __ldcg(row + i), token = __ldcg(row + 2 * a.n + i);
      position = __ldcg(row + a.n + i);
      if (stamp != epoch) position = -1;
      shared.key[i] = key_of(__int_as_float(bits));
      shared.position[i] = position;
      shared.token[i] = token;
    }
    held += __syncthreads_count(position >= 0);
  }
  const int total = held + fresh;

  // Entry e of the two lists together is at index e, or in the second half.
  const auto at = [held](int e) { return e < held ? e : kMaxN + e - held; };
#pragma unroll 1
  for (int e = threadIdx.x; e < total; e += kThreads) {
    shared.merged[at(e)] = (e < held ? e : e - held) + count_before(shared, at(e), held, fresh);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < held; i += kThreads) {
    const int position = shared.position[i];
    if (position >= a.length) continue;
    const int rank = rank_at[position], other = kMaxN + rank;
    if (rank >= fresh || shared.position[other] != position || shared.token[other] != shared.token[i]) continue;
    const int lesser = shared.merged[shared.key[other] > shared.key[i] ? i : other];
    atomicOr(shared.dropped + lesser / 32, 1u << lesser % 32);
  }
  __syncthreads();
  const auto kept_before = [&shared](int place) {
    int kept = place;
#pragma unroll 1
    for (int word = 0; word < place / 32; ++word) kept -= __popc(shared.dropped[word]);
    return kept - __popc(shared.dropped[place / 32] & ((1u << place % 32) - 1));
  };
#pragma unroll 1
  for (int e = threadIdx.x; e < total; e += kThreads) {
    const int i = at(e), merged = shared.merged[i], place = kept_before(merged);
    if (place >= a.n || shared.dropped[merged / 32] >> merged % 32 & 1) continue;
    __stcg(row + place, __float_as_int(value_of(shared.key[i])));
    __stcg(row + a.n + place, shared.position[i]);
    __stcg(row + 2 * a.n + place, shared.token[i]);
  }
#pragma unroll 1
  for (int i = kept_before(total) + static_cast<int>(threadIdx.x); i < a.n; i += kThreads) {
    __stcg(row + i, __float_as_int(-INFINITY));
    __stcg(row + a.n + i, -1);
    __stcg(row + 2 * a.n + i, -1);
  }
  if (threadIdx.x == 0) __stcg(a.stamp + slot, epoch);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(lock, 0);
}

}  // namespace ntpseg
