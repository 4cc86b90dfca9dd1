// The kernels and their launchers.
#include <cuda_runtime.h>

#include <cstdint>

#include "memory.cuh"
#include "select.cuh"
#include "topn.h"

namespace ntpseg {
namespace {

// What a thread's columns hold, `none` beyond the row's end. A vector is taken whole: rows that are read as vectors
// have a multiple of four columns.
template <class T>
__device__ __forceinline__ T load(const T* from, bool inside, T none) {
  return inside ? __ldcs(from) : none;
}

// Loads a thread's columns as keys, 0 where there is no error. kVectors needs rows that start aligned. Nothing is
// looked at before all is asked for, and no branch parts the loads, so that they travel together.
template <bool kVectors, int kThreads, int kItems>
__device__ __forceinline__ void load_keys(const TopnArguments& a, int64_t row, uint32_t (&keys)[kItems]) {
  const float* deviation = a.deviation + row * a.length + 4 * threadIdx.x;
  const uint8_t* is_error = a.is_error + row * a.length + 4 * threadIdx.x;
  float value[kItems];
  uint32_t errors[kItems / 4];  // a byte each
#pragma unroll
  for (int i = 0; i < kItems; i += 4) {
    const int ahead = i * kThreads, column = column_of<kThreads>(i);
    if (kVectors) {
      const bool inside = column < a.length;
      const float4 v = load(reinterpret_cast<const float4*>(deviation + ahead), inside, make_float4(0, 0, 0, 0));
      value[i] = v.x, value[i + 1] = v.y, value[i + 2] = v.z, value[i + 3] = v.w;
      errors[i / 4] = load(reinterpret_cast<const uint32_t*>(is_error + ahead), inside, 0u);
    } else {
      errors[i / 4] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool inside = column + j < a.length;
        value[i + j] = load(deviation + ahead + j, inside, 0.0f);
        errors[i / 4] |= static_cast<uint32_t>(load(is_error + ahead + j, inside, uint8_t{0})) << 8 * j;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys[i] = errors[i / 4] & 0xffu << i % 4 * 8 ? key_of(value[i]) : 0;
}

// As above. Tokens fill four registers a column: where a thread has many columns it asks for four at a time, which from
// all of a multiprocessor's threads still covers the memory's latency.
template <bool kVectors, int kThreads, int kItems>
__device__ __forceinline__ void load_keys(const RecordArguments& a, int64_t row, uint32_t (&keys)[kItems]) {
  constexpr int kTogether = kItems > 8 ? 4 : kItems;
  const float* deviation = a.deviation + row * a.length + 4 * threadIdx.x;
  const int64_t* prediction = a.prediction + row * a.length + 4 * threadIdx.x;
  const int64_t* labels = a.labels + row * a.length + 4 * threadIdx.x;
#pragma unroll
  for (int first = 0; first < kItems; first += kTogether) {
    float value[kTogether];
    int64_t predicted[kTogether], label[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i += 4) {
      const int ahead = (first + i) * kThreads, column = column_of<kThreads>(first + i);
      if (kVectors) {
        const bool inside = column < a.length;
        const float4 v = load(reinterpret_cast<const float4*>(deviation + ahead), inside, make_float4(0, 0, 0, 0));
        value[i] = v.x, value[i + 1] = v.y, value[i + 2] = v.z, value[i + 3] = v.w;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const longlong2 none = make_longlong2(-1, -1);
          const longlong2 p = load(reinterpret_cast<const longlong2*>(prediction + ahead + j), inside, none);
          const longlong2 y = load(reinterpret_cast<const longlong2*>(labels + ahead + j), inside, none);
          predicted[i + j] = p.x, predicted[i + j + 1] = p.y;
          label[i + j] = y.x, label[i + j + 1] = y.y;
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool inside = column + j < a.length;
          value[i + j] = load(deviation + ahead + j, inside, 0.0f);
          predicted[i + j] = load(prediction + ahead + j, inside, int64_t{-1});
          label[i + j] = load(labels + ahead + j, inside, int64_t{-1});
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool error = predicted[i] >= 0 && label[i] != a.ignore_index && predicted[i] != label[i];
      keys[first + i] = error ? key_of(value[i]) : 0;
    }
  }
}

template <int kThreads, int kItems, class Arguments>
__device__ __forceinline__ int select_from(
    const Arguments& a, int64_t row, bool vectors, SelectShared<kThreads>& shared) {
  clear<kThreads>(shared);
  uint32_t keys[kItems];
  if (vectors) {
    load_keys<true, kThreads, kItems>(a, row, keys);
  } else {
    load_keys<false, kThreads, kItems>(a, row, keys);
  }
  return select_row<kThreads, kItems>(shared, keys, a.n);
}

// The bounds' second number: threads on a multiprocessor that registers must suffice for, as many as go without spills.
template <int kThreads, int kItems>
__global__ __launch_bounds__(kThreads, (kItems == 16 ? 1280 : 1024) / kThreads) void topn_kernel(
    TopnArguments a, bool vectors) {
  __shared__ SelectShared<kThreads> shared;
  const int64_t row = blockIdx.x;
  const int candidates = select_from<kThreads, kItems>(a, row, vectors, shared);
  float* value = a.value + row * a.n;
  int32_t* index = a.index + row * a.n;
#pragma unroll 1
  for (int i = threadIdx.x; i < candidates; i += kThreads) {
    const int place = shared.place[i];
    if (place >= a.n) continue;
    value[place] = value_of(composite_key(shared.candidate[i]));
    index[place] = composite_column(shared.candidate[i]);
  }
#pragma unroll 1
  for (int i = candidates + threadIdx.x; i < a.n; i += kThreads) {
    value[i] = -INFINITY;
    index[i] = -1;
  }
}

template <int kThreads, int kItems>
__global__ __launch_bounds__(kThreads, 1024 / kThreads) void record_kernel(RecordArguments a, bool vectors) {
  __shared__ SelectShared<kThreads> shared;
  __shared__ MergeShared merge;
  const int64_t row = blockIdx.x;
  // Asked for with the columns and looked at after them.
  const int64_t sample = a.sample_ids[row];
  const int epoch = static_cast<int>(*a.epoch);
  const int candidates = select_from<kThreads, kItems>(a, row, vectors, shared);
  if (sample < 0 || sample >= a.samples) {
    if (threadIdx.x == 0) atomicAdd(a.control, 1);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < candidates; i += kThreads) {
    const int place = shared.place[i];
    if (place >= a.n) continue;
    const int column = composite_column(shared.candidate[i]);
    merge.key[kMaxN + place] = composite_key(shared.candidate[i]);
    merge.position[kMaxN + place] = column;
    merge.token[kMaxN + place] = static_cast<int>(a.prediction[row * a.length + column]);
  }
  __syncthreads();
  static_assert(sizeof shared.bins >= kThreads * kItems);
  merge_row<kThreads>(a, merge, reinterpret_cast<uint8_t*>(shared.bins), sample, epoch, min(candidates, a.n));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool loads_vectors(const TopnArguments& a) {
  return a.length % 4 == 0 && aligned(a.deviation) && aligned(a.is_error);
}

bool loads_vectors(const RecordArguments& a) {
  return a.length % 4 == 0 && aligned(a.deviation) && aligned(a.prediction) && aligned(a.labels);
}

template <int kThreads, int kItems>
constexpr void (*kernel_for(const TopnArguments&))(TopnArguments, bool) {
  return topn_kernel<kThreads, kItems>;
}

template <int kThreads, int kItems>
constexpr void (*kernel_for(const RecordArguments&))(RecordArguments, bool) {
  return record_kernel<kThreads, kItems>;
}

// A block to a row, each thread holding kItems of its columns.
template <int kThreads, int kItems, class Arguments>
int enqueue(const Arguments& a, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(a.rows));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel_for<kThreads, kItems>(a), a, loads_vectors(a));
}

// Few rows are a matter of latency: more threads share a row, though not as many as could, for what every warp does
// whatever it holds would then outweigh the rest. Many are a matter of throughput: small blocks, several to a
// multiprocessor, so that one loads while another sifts.
constexpr int64_t kFewRows = 320;

template <class Arguments>
int launch(const Arguments& a, void* raw_stream) {
  if (a.rows == 0 || a.n == 0) return cudaSuccess;
  if (a.length > kMaxLength || a.n > kMaxN || a.rows > INT32_MAX) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  if (a.length <= 512) return enqueue<128, 4>(a, stream);
  if (a.length <= 1024) return enqueue<256, 4>(a, stream);
  if (a.length <= 2048) return enqueue<256, 8>(a, stream);
  if (a.length <= 4096 && a.rows <= kFewRows) return enqueue<512, 8>(a, stream);
  if (a.length <= 4096) return enqueue<256, 16>(a, stream);
  return enqueue<1024, 16>(a, stream);
}

}  // namespace

int launch_topn(const TopnArguments& arguments, void* stream) { return launch(arguments, stream); }

int launch_record(const RecordArguments& arguments, void* stream) { return launch(arguments, stream); }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ntpseg
