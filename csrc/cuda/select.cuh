// Finding the n largest of a row that a thread block holds in registers.
//
// A column's composite is its key, the float's bits flipped so that unsigned integers compare as the floats do, above
// its column counted backwards: composites are distinct, and ties fall to the lowest column by themselves. A
// histogram of their leading 11 bits finds the bin that holds the n-th largest; while too many columns lie in that bin
// or above, the next 11 bits are counted within it. The few that are left are ordered by counting, for each, how many
// exceed it. All of it is deterministic, whatever the order of the threads.
#pragma once

#include <cstdint>

namespace ntpseg {

constexpr int kColumnBits = 14;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kSpare = 64;  // columns beyond n that are cheaper to order than to sift once more
constexpr int kMaxCandidates = 256 + kSpare;

struct SelectShared {
  // Counted per composite prefix; afterwards the room is free.
  uint32_t bins[kBins];
  alignas(16) unsigned long long candidate[kMaxCandidates + 1];
  int place[kMaxCandidates];
  int warp_total[32];
  int bound, above, in_bin, candidates;
};

// 0 is no key: -inf, the least, has 0x007fffff.
__device__ __forceinline__ uint32_t key_of(float value) {
  value = isnan(value) ? INFINITY : value + 0.0f;  // -0 becomes +0
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ unsigned long long composite_of(uint32_t key, int column) {
  // Opaque to the compiler, which would otherwise keep all composites in registers between the loops, and spill.
  asm volatile("" : "+r"(key));
  return static_cast<unsigned long long>(key) << kColumnBits | ((1 << kColumnBits) - 1 - column);
}

__device__ __forceinline__ uint32_t composite_key(unsigned long long composite) {
  return static_cast<uint32_t>(composite >> kColumnBits);
}

__device__ __forceinline__ int composite_column(unsigned long long composite) {
  return (1 << kColumnBits) - 1 - static_cast<int>(composite & ((1 << kColumnBits) - 1));
}

// Item i of a thread is this column: four neighbours at a time, so that they can be loaded as one vector.
template <int kThreads>
__device__ __forceinline__ int column_of(int item) {
  return ((item / 4) * kThreads + static_cast<int>(threadIdx.x)) * 4 + item % 4;
}

__device__ __forceinline__ void count_digit(uint32_t* bins, bool active, uint32_t digit) {
  const unsigned lanes = __ballot_sync(0xffffffffu, active);
  if (!active) return;
  // Equal values are common (all columns in one bin): one lane then counts for the warp.
  int same;
  __match_all_sync(lanes, digit, &same);
  if (!same) {
    atomicAdd(bins + digit, 1u);
  } else if ((threadIdx.x & 31) == __ffs(lanes) - 1) {
    atomicAdd(bins + digit, static_cast<uint32_t>(__popc(lanes)));
  }
}

// Finds, from the top, the bin in which the wanted-th column lies; all threads get it in shared memory.
template <int kThreads>
__device__ void find_bin(SelectShared& shared, int wanted) {
  constexpr int kOwn = kBins / kThreads, kWarps = kThreads / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += static_cast<int>(shared.bins[top - i]);
  int upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) shared.warp_total[warp] = upto;
  __syncthreads();
  const int before = lane < warp && lane < kWarps ? shared.warp_total[lane] : 0;
  upto += __reduce_add_sync(0xffffffffu, before);
  int above = upto - own;
  if (above < wanted && wanted <= upto) {
    int bin = top;
    while (above + static_cast<int>(shared.bins[bin]) < wanted) above += static_cast<int>(shared.bins[bin--]);
    shared.bound = bin;
    shared.above = above;
    shared.in_bin = static_cast<int>(shared.bins[bin]);
  }
  __syncthreads();
}

// Puts the min(n, errors) largest of the row in front of shared.candidate together with at most kSpare others, gives
// shared.place[i] the place of candidate i and returns the number of candidates. keys holds 0 where there is no error.
template <int kThreads, int kItems>
__device__ int select_row(SelectShared& shared, const uint32_t (&keys)[kItems], int n) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int errors = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) errors += keys[i] != 0;
  errors = __reduce_add_sync(0xffffffffu, errors);
  if (lane == 0) shared.warp_total[warp] = errors;
  if (threadIdx.x == 0) shared.candidates = 0;
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
  __syncthreads();
  const int total = __reduce_add_sync(0xffffffffu, lane < kWarps ? shared.warp_total[lane] : 0);

  // Candidates are the errors whose composite, shifted, is not below the bound.
  int shift = 32 + kColumnBits;
  unsigned long long bound = 0;
  int above = 0, kept = total;
  while (kept > n + kSpare) {
    const int finer = max(shift - kDigitBits, 0);
    // The first turn has counted nothing yet, so every error is in play: bound and the shifted composite are 0.
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const unsigned long long composite = composite_of(keys[i], column_of<kThreads>(i));
      const bool active = keys[i] != 0 && composite >> shift == bound;
      count_digit(shared.bins, active, static_cast<uint32_t>(composite >> finer) & (kBins - 1));
    }
    __syncthreads();
    find_bin<kThreads>(shared, n - above);
    const int digits = shift - finer;
    bound = bound << digits | (shared.bound & ((1 << digits) - 1));
    shift = finer;
    above += shared.above;
    kept = above + shared.in_bin;
    if (kept > n + kSpare) {
      __syncthreads();
      for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
      __syncthreads();
    }
  }

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const unsigned long long composite = composite_of(keys[i], column_of<kThreads>(i));
    const bool chosen = keys[i] != 0 && composite >> shift >= bound;
    const unsigned lanes = __ballot_sync(0xffffffffu, chosen);
    if (lanes == 0) continue;
    int first = 0;
    if (lane == 0) first = atomicAdd(&shared.candidates, __popc(lanes));
    first = __shfl_sync(0xffffffffu, first, 0);
    if (chosen) shared.candidate[first + __popc(lanes & ((1u << lane) - 1))] = composite;
  }
  for (int i = threadIdx.x; i < kMaxCandidates; i += kThreads) shared.place[i] = 0;
  __syncthreads();

  // Whole warps share a slice of the candidates to compare with, so that its loads are broadcasts.
  const int padded = (kept + 31) / 32 * 32;
  const int slices = padded == 0 ? 1 : max(1, min(kThreads / padded, (kept + 7) / 8));
  const int slice_size = (kept + slices - 1) / slices;
  for (int work = threadIdx.x; work < padded * slices; work += kThreads) {
    const int own = work % padded, slice = work / padded;
    if (own >= kept) continue;
    const unsigned long long mine = shared.candidate[own];
    const int stop = min(kept, (slice + 1) * slice_size);
    int exceeding = 0;
#pragma unroll 4
    for (int j = slice * slice_size; j < stop; ++j) exceeding += shared.candidate[j] > mine;
    atomicAdd(shared.place + own, exceeding);
  }
  __syncthreads();
  return kept;
}

}  // namespace ntpseg
