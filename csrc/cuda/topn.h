// The CUDA launchers: raw pointers, sizes and a stream; no torch headers, so that nvcc alone compiles them.
#pragma once

#include <cstdint>

namespace ntpseg {

constexpr int kMaxLength = 16384;
constexpr int kMaxN = 256;

struct TopnArguments {
  const float* deviation;   // [rows, length]
  const uint8_t* is_error;  // [rows, length]
  float* value;             // [rows, n]
  int32_t* index;           // [rows, n]
  int64_t rows;
  int length, n;
};

// ntpseg/ops/record.py describes the memory's tensors.
struct RecordArguments {
  const float* deviation;     // [rows, length]
  const int64_t* prediction;  // [rows, length]
  const int64_t* labels;      // [rows, length]
  const int64_t* sample_ids;  // [rows]
  const int64_t* epoch;       // one number
  int32_t* memory;            // [2, samples, 3, n]
  int32_t* stamp;             // [2, samples]
  int32_t* control;           // [1 + locks]
  int64_t rows, samples, ignore_index;
  int length, n, locks;
};

// Both enqueue one kernel on the stream of the current device, never wait, allocate or copy, and may be captured into
// a graph. They return a cudaError_t, 0 for success.
int launch_topn(const TopnArguments& arguments, void* stream);
int launch_record(const RecordArguments& arguments, void* stream);
const char* error_text(int error);

}  // namespace ntpseg
