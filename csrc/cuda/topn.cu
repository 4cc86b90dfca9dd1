// The kernels and their launchers.
#include <cuda_runtime.h>

#include <cstdint>

#include "memory.cuh"
#include "select.cuh"
#include "topn.h"

namespace ntpseg {
namespace {

// Loads a thread's columns as keys, 0 where there is no error. Vectors of four need rows that start aligned.
template <int kThreads, int kItems>
__device__ void load_keys(const TopnArguments& a, int64_t row, bool vectors, uint32_t (&keys)[kItems]) {
  const float* deviation = a.deviation + row * a.length;
  const uint8_t* is_error = a.is_error + row * a.length;
#pragma unroll
  for (int i = 0; i < kItems; i += 4) {
    const int column = column_of<kThreads>(i);
    float value[4] = {};
    uint8_t error[4] = {};
    if (vectors) {
      if (column < a.length) {
        const float4 v = __ldcs(reinterpret_cast<const float4*>(deviation + column));
        const uchar4 e = __ldcs(reinterpret_cast<const uchar4*>(is_error + column));
        value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
        error[0] = e.x, error[1] = e.y, error[2] = e.z, error[3] = e.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < a.length) {
          value[j] = __ldcs(deviation + column + j);
          error[j] = __ldcs(is_error + column + j);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) keys[i + j] = error[j] ? key_of(value[j]) : 0;
  }
}

template <int kThreads, int kItems>
__device__ void load_keys(const RecordArguments& a, int64_t row, bool vectors, uint32_t (&keys)[kItems]) {
  const float* deviation = a.deviation + row * a.length;
  const int64_t* prediction = a.prediction + row * a.length;
  const int64_t* labels = a.labels + row * a.length;
#pragma unroll
  for (int i = 0; i < kItems; i += 4) {
    const int column = column_of<kThreads>(i);
    float value[4] = {};
    int64_t predicted[4] = {-1, -1, -1, -1}, label[4] = {};
    if (vectors) {
      if (column < a.length) {
        const float4 v = __ldcs(reinterpret_cast<const float4*>(deviation + column));
        value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const longlong2 p = __ldcs(reinterpret_cast<const longlong2*>(prediction + column + j));
          const longlong2 y = __ldcs(reinterpret_cast<const longlong2*>(labels + column + j));
          predicted[j] = p.x, predicted[j + 1] = p.y;
          label[j] = y.x, label[j + 1] = y.y;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column + j < a.length) {
          value[j] = __ldcs(deviation + column + j);
          predicted[j] = prediction[column + j];
          label[j] = labels[column + j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool error = predicted[j] >= 0 && label[j] != a.ignore_index && predicted[j] != label[j];
      keys[i + j] = error ? key_of(value[j]) : 0;
    }
  }
}

template <int kThreads, int kItems>
__global__ __launch_bounds__(kThreads, kThreads == 1024 ? 1 : 768 / kThreads) void topn_kernel(TopnArguments a, bool vectors) {
  __shared__ SelectShared shared;
  const int64_t row = blockIdx.x;
  uint32_t keys[kItems];
  load_keys<kThreads, kItems>(a, row, vectors, keys);
  const int candidates = select_row<kThreads, kItems>(shared, keys, a.n);
  float* value = a.value + row * a.n;
  int32_t* index = a.index + row * a.n;
  for (int i = threadIdx.x; i < candidates; i += kThreads) {
    const int place = shared.place[i];
    if (place >= a.n) continue;
    value[place] = value_of(composite_key(shared.candidate[i]));
    index[place] = composite_column(shared.candidate[i]);
  }
  for (int i = candidates + threadIdx.x; i < a.n; i += kThreads) {
    value[i] = -INFINITY;
    index[i] = -1;
  }
}

template <int kThreads, int kItems>
__global__ __launch_bounds__(kThreads, kThreads == 1024 ? 1 : 768 / kThreads) void record_kernel(RecordArguments a, bool vectors) {
  __shared__ SelectShared shared;
  __shared__ MergeShared merge;
  const int64_t row = blockIdx.x;
  const int64_t sample = a.sample_ids[row];
  if (sample < 0 || sample >= a.samples) {
    if (threadIdx.x == 0) atomicAdd(a.control, 1);
    return;
  }
  uint32_t keys[kItems];
  load_keys<kThreads, kItems>(a, row, vectors, keys);
  const int candidates = select_row<kThreads, kItems>(shared, keys, a.n);
  for (int i = threadIdx.x; i < candidates; i += kThreads) {
    const int place = shared.place[i];
    if (place >= a.n) continue;
    const int column = composite_column(shared.candidate[i]);
    merge.key[kMaxN + place] = composite_key(shared.candidate[i]);
    merge.position[kMaxN + place] = column;
    merge.token[kMaxN + place] = static_cast<int>(a.prediction[row * a.length + column]);
  }
  __syncthreads();
  merge_row<kThreads>(a, merge, sample, min(candidates, a.n));
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

// Few rows are a matter of latency: as many threads as can share a row. Many are a matter of throughput: small blocks,
// several to a multiprocessor, so that one loads while another sifts.
constexpr int64_t kFewRows = 320;

template <class Arguments>
int launch(const Arguments& a, void* raw_stream) {
  if (a.rows == 0 || a.n == 0) return cudaSuccess;
  if (a.length > kMaxLength || a.n > kMaxN || a.rows > INT32_MAX) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  if (a.length <= 512) return enqueue<128, 4>(a, stream);
  if (a.length <= 1024) return enqueue<256, 4>(a, stream);
  if (a.length <= 4096 && a.rows <= kFewRows) return enqueue<1024, 4>(a, stream);
  if (a.length <= 4096) return enqueue<256, 16>(a, stream);
  return enqueue<1024, 16>(a, stream);
}

}  // namespace

int launch_topn(const TopnArguments& arguments, void* stream) { return launch(arguments, stream); }

int launch_record(const RecordArguments& arguments, void* stream) { return launch(arguments, stream); }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ntpseg
