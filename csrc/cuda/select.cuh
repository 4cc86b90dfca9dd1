// Finding the n largest of a row that a thread block holds in registers.
//
// A key is the float's bits, flipped so that unsigned integers compare as the floats do. Keys are counted in bins by
// their distance from the largest, which finds the bin that holds the n-th largest; while too many lie in that bin or
// above, it is split in turn. Where equal keys alone are too many, their columns are counted instead, the lowest
// first. The few that are left are ordered by counting, for each, how many exceed it: the key decides, then the lower
// column. All of it is deterministic, whatever the order of the threads.
#pragma once

#include <cstdint>

#include "topn.h"

namespace ntpseg {

constexpr int kColumnBits = 14;
static_assert(kMaxLength == 1 << kColumnBits);
constexpr int kSpare = 64;  // columns beyond n that are cheaper to order than to sift once more
constexpr int kMaxCandidates = kMaxN + kSpare;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <int kThreads>
struct SelectShared {
  alignas(16) uint32_t bins[4 * kThreads];  // four to a thread, a vector; after the selection the room is free
  alignas(16) unsigned long long candidate[kMaxCandidates + 3];
  alignas(16) int place[kMaxCandidates];
  uint32_t of_warp[32];
  int bound, above, in_bin, candidates;
};

// 0 is no key: -inf, the least, has 0x007fffff. The minimum turns NaN into +inf, the sum -0 into +0.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(fminf(value, INFINITY) + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Composites are distinct and compare as their keys do, then backwards by column. They stay below 2^63.
__device__ __forceinline__ unsigned long long composite_of(uint32_t key, int column) {
  return static_cast<unsigned long long>(key) << kColumnBits | static_cast<uint32_t>(kMaxLength - 1 - column);
}

__device__ __forceinline__ uint32_t composite_key(unsigned long long composite) {
  return static_cast<uint32_t>(composite >> kColumnBits);
}

__device__ __forceinline__ int composite_column(unsigned long long composite) {
  return kMaxLength - 1 - static_cast<int>(composite & (kMaxLength - 1));
}

// Item i of a thread is this column: four neighbours at a time, so that they can be loaded as one vector.
template <int kThreads>
__device__ __forceinline__ int column_of(int item) {
  return ((item >> 2) * kThreads + static_cast<int>(threadIdx.x)) * 4 + (item & 3);
}

// keys[item] by a tree of selections: registers have no index.
template <int kFirst, int kCount, int kItems>
__device__ __forceinline__ uint32_t pick(const uint32_t (&keys)[kItems], int item) {
  if constexpr (kCount == 1) {
    return keys[kFirst];
  } else {
    const uint32_t low = pick<kFirst, kCount / 2>(keys, item);
    const uint32_t high = pick<kFirst + kCount / 2, kCount / 2>(keys, item);
    return item & kCount / 2 ? high : low;
  }
}

__device__ constexpr int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

__device__ __forceinline__ int sum_up_to(int value) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWholeWarp, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Before select_row; early, so that it is done while the row's loads are under way.
template <int kThreads>
__device__ void clear(SelectShared<kThreads>& shared) {
  reinterpret_cast<uint4*>(shared.bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  static_assert(kMaxCandidates % 4 == 0 && kMaxCandidates / 4 <= kThreads);
  if (threadIdx.x < kMaxCandidates / 4) reinterpret_cast<uint4*>(shared.place)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) shared.candidates = 0;
}

// Finds, from the first bin on, the one in which the wanted-th count lies, or the last where there are fewer; all
// threads get it in shared memory. Clears the bins.
template <int kThreads>
__device__ void find_bin(SelectShared<kThreads>& shared, int wanted) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint4* bins = reinterpret_cast<uint4*>(shared.bins) + threadIdx.x;
  const uint4 own = *bins;
  *bins = make_uint4(0, 0, 0, 0);
  const int count[4] = {
      static_cast<int>(own.x), static_cast<int>(own.y), static_cast<int>(own.z), static_cast<int>(own.w)};
  const int sum = count[0] + count[1] + count[2] + count[3];
  const int upto = sum_up_to(sum);
  if (lane == 31) shared.of_warp[warp] = static_cast<uint32_t>(upto);
  __syncthreads();
  const uint32_t before = lane < warp ? shared.of_warp[lane] : 0;
  int above = upto - sum + static_cast<int>(__reduce_add_sync(kWholeWarp, before));
  if (above < wanted && (wanted <= above + sum || threadIdx.x == kThreads - 1)) {
    int bin = 0, in_bin = count[0];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (bin == i && above + count[i] < wanted) {
        above += count[i];
        bin = i + 1;
        in_bin = count[i + 1];
      }
    }
    shared.bound = static_cast<int>(threadIdx.x) * 4 + bin;
    shared.above = above;
    shared.in_bin = in_bin;
  }
  __syncthreads();
}

// Puts the min(n, errors) largest of the row in front of shared.candidate together with at most kSpare others, gives
// shared.place[i] the place of candidate i and returns the number of candidates. keys holds 0 where there is no error.
// n is at least 1.
template <int kThreads, int kItems>
__device__ int select_row(SelectShared<kThreads>& shared, const uint32_t (&keys)[kItems], int n) {
  constexpr int kWarps = kThreads / 32, kBins = 4 * kThreads, kBinBits = log2_of(kBins);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint32_t high = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) high = max(high, keys[i]);
  high = __reduce_max_sync(kWholeWarp, high);
  if (lane == 0) shared.of_warp[warp] = high;
  __syncthreads();
  high = __reduce_max_sync(kWholeWarp, lane < kWarps ? shared.of_warp[lane] : 0u);
  if (high == 0) return 0;

  // In play are the keys from high - extent to high; `above` is how many exceed high. The bins of the first turn span
  // eight octaves below the largest key, where the n-th largest nearly always is, and the last takes all the rest.
  uint32_t extent = high - 1;
  int shift = 26 - kBinBits, above = 0, kept;
  do {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t distance = high - keys[i];
      if (distance <= extent) atomicAdd(shared.bins + min(distance >> shift, kBins - 1u), 1u);
    }
    __syncthreads();
    find_bin<kThreads>(shared, n - above);
    // high - extent stays what it is if the bin is the last, even past 0 where there are fewer errors than n.
    const uint32_t nearer = static_cast<uint32_t>(shared.bound) << shift;
    high -= nearer;
    extent -= nearer;
    if (shared.bound < kBins - 1) extent = min(extent, (1u << shift) - 1);
    above += shared.above;
    kept = above + shared.in_bin;
    shift = max(0, 32 - __clz(static_cast<int>(extent)) - kBinBits);
  } while (kept > n + kSpare && extent != 0);

  const uint32_t least = high - extent;
  int limit = kThreads * kItems;  // columns of the least key count below this one alone
  if (kept > n + kSpare) {
    constexpr int kColumns = kItems / 4;  // a bin's, all of them one thread's
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      uint32_t ties = 0;
#pragma unroll
      for (int i = b * kColumns; i < (b + 1) * kColumns; ++i) ties += keys[i] == least;
      shared.bins[column_of<kThreads>(b * kColumns) / kColumns] = ties;
    }
    __syncthreads();
    find_bin<kThreads>(shared, n - above);
    limit = (shared.bound + 1) * kColumns;
    kept = above + shared.above + shared.in_bin;
  }

  unsigned chosen = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) chosen |= keys[i] >= least ? 1u << i : 0u;
  if (limit < kThreads * kItems) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (keys[i] == least && column_of<kThreads>(i) >= limit) chosen &= ~(1u << i);
    }
  }
  const int own = __popc(chosen), upto = sum_up_to(own);
  int next = 0;
  if (lane == 31) next = atomicAdd(&shared.candidates, upto);
  next = __shfl_sync(kWholeWarp, next, 31) + upto - own;
  // Most threads have none or one.
  for (; chosen != 0; chosen &= chosen - 1) {
    const int item = __ffs(static_cast<int>(chosen)) - 1;
    shared.candidate[next++] = composite_of(pick<0, kItems>(keys, item), column_of<kThreads>(item));
  }
  if (threadIdx.x < 3) shared.candidate[kept + threadIdx.x] = 0;  // exceeds nothing; fills the last four
  __syncthreads();

  // As many threads as there are for it share a candidate's comparisons, four in turn each. The difference's sign costs
  // an instruction less than the comparison. t / kept is t * inverse >> 20 for all t up to 1024.
  const uint32_t inverse = (1u << 20) / static_cast<uint32_t>(kept) + 1;
  const int sharers = max(1, static_cast<int>(kThreads * inverse >> 20));
  const int sharer = static_cast<int>(threadIdx.x * inverse >> 20);
  if (sharer < sharers) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) - sharer * kept; i < kept; i += kThreads) {
      const unsigned long long mine = shared.candidate[i];
      uint32_t exceeding = 0;
#pragma unroll 1
      for (int j = 4 * sharer; j < kept; j += 4 * sharers) {
        const auto* pairs = reinterpret_cast<const ulonglong2*>(shared.candidate + j);
        for (const ulonglong2 pair : {pairs[0], pairs[1]}) {
          exceeding += static_cast<uint32_t>((mine - pair.x) >> 32) >> 31;
          exceeding += static_cast<uint32_t>((mine - pair.y) >> 32) >> 31;
        }
      }
      atomicAdd(shared.place + i, static_cast<int>(exceeding));
    }
  }
  __syncthreads();
  return kept;
}

}  // namespace ntpseg
