// Tensors as the operators take them: checks, typed access, results. The Python side turns user errors into ValueErrors
// before these.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

namespace ntpseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline void check_tensor(const Tensor& tensor, const char* name, int64_t dim, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.dim() == dim && tensor.scalar_type() == type && tensor.is_contiguous(),
      name,
      " must be contiguous, of ",
      dim,
      " dimensions and of dtype number ",
      static_cast<int>(type),
      ", got ",
      tensor.dim(),
      " dimensions of dtype number ",
      static_cast<int>(tensor.scalar_type()));
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// `must` says what, such as "be [B, 3, m]" or "have the shape of deviation".
inline void check_shape(bool condition, const Tensor& tensor, const char* name, const char* must) {
  STD_TORCH_CHECK(condition, name, " must ", must, ", got ", shape_text(tensor));
}

inline void check_length(int64_t length) {
  STD_TORCH_CHECK(length <= INT32_MAX, "a row must have fewer than 2^31 columns, got ", length);
}

// Returns (rows, length).
inline std::pair<int64_t, int64_t> check_topn(const Tensor& deviation, const Tensor& is_error, int64_t n) {
  check_tensor(deviation, "deviation", 2, ScalarType::Float);
  check_tensor(is_error, "is_error", 2, ScalarType::Bool);
  const bool same = deviation.size(0) == is_error.size(0) && deviation.size(1) == is_error.size(1);
  check_shape(same, is_error, "is_error", "have the shape of deviation");
  check_length(deviation.size(1));
  STD_TORCH_CHECK(n >= 0, "n must be >= 0, got ", n);
  return {deviation.size(0), deviation.size(1)};
}

// Uninitialised (value, index) of topn_errors.
inline std::tuple<Tensor, Tensor> empty_topn(const Tensor& deviation, int64_t rows, int64_t n) {
  return {
      torch::stable::new_empty(deviation, {rows, n}),
      torch::stable::new_empty(deviation, {rows, n}, ScalarType::Int)};
}

inline void check_memory(const Tensor& rows, const Tensor& stamp, const Tensor& control, const Tensor& epoch) {
  check_tensor(rows, "rows", 4, ScalarType::Int);
  check_tensor(stamp, "stamp", 2, ScalarType::Int);
  check_tensor(control, "control", 1, ScalarType::Int);
  check_tensor(epoch, "epoch", 0, ScalarType::Long);
  check_shape(rows.size(0) == 2 && rows.size(2) == 3, rows, "rows", "be [2, N, 3, n]");
  check_shape(stamp.size(0) == 2 && stamp.size(1) == rows.size(1), stamp, "stamp", "be [2, N] with rows [2, N, 3, n]");
  check_shape(control.size(0) >= 2, control, "control", "be [1 + L], a counter and L >= 1 locks");
}

// What record_errors reads, checked: sample_ids [batch]; prediction, labels, deviation [batch, length].
struct RecordInputs {
  int64_t samples, n, batch, length;
  const int64_t* sample_ids;
  const int64_t* prediction;
  const int64_t* labels;
  const float* deviation;
};

inline RecordInputs check_record(
    const Tensor& rows,
    const Tensor& stamp,
    const Tensor& control,
    const Tensor& epoch,
    const Tensor& sample_ids,
    const Tensor& prediction,
    const Tensor& labels,
    const Tensor& deviation) {
  check_memory(rows, stamp, control, epoch);
  check_tensor(sample_ids, "sample_ids", 1, ScalarType::Long);
  check_tensor(prediction, "prediction", 2, ScalarType::Long);
  check_tensor(labels, "labels", 2, ScalarType::Long);
  check_tensor(deviation, "deviation", 2, ScalarType::Float);
  const int64_t batch = prediction.size(0), length = prediction.size(1);
  check_shape(sample_ids.size(0) == batch, sample_ids, "sample_ids", "be [B] with prediction [B, T]");
  check_shape(labels.size(0) == batch && labels.size(1) == length, labels, "labels", "have the shape of prediction");
  const bool same = deviation.size(0) == batch && deviation.size(1) == length;
  check_shape(same, deviation, "deviation", "have the shape of prediction");
  check_length(length);
  return {
      rows.size(1),
      rows.size(3),
      batch,
      length,
      data<const int64_t>(sample_ids),
      data<const int64_t>(prediction),
      data<const int64_t>(labels),
      data<const float>(deviation)};
}

}  // namespace ntpseg
