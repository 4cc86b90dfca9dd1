// What the operators demand of their tensors; the Python side turns user errors into ValueErrors before these.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

namespace ntpseg {

using torch::headeronly::ScalarType;

inline void check_tensor(const torch::stable::Tensor& tensor, const char* name, int64_t dim, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.dim() == dim && tensor.scalar_type() == type && tensor.is_contiguous(),
      name,
      " must be contiguous, of ",
      dim,
      " dimensions and of dtype number ",
      static_cast<int>(type));
}

// Returns (rows, length).
inline std::pair<int64_t, int64_t> check_topn(
    const torch::stable::Tensor& deviation,
    const torch::stable::Tensor& is_error,
    int64_t n) {
  check_tensor(deviation, "deviation", 2, ScalarType::Float);
  check_tensor(is_error, "is_error", 2, ScalarType::Bool);
  STD_TORCH_CHECK(
      deviation.size(0) == is_error.size(0) && deviation.size(1) == is_error.size(1),
      "is_error must have the shape of deviation");
  STD_TORCH_CHECK(deviation.size(1) <= INT32_MAX, "a row must have fewer than 2^31 columns");
  STD_TORCH_CHECK(n >= 0, "n must be 0 or more");
  return {deviation.size(0), deviation.size(1)};
}

struct RecordShape {
  int64_t samples, n, batch, length;
};

inline void check_memory(
    const torch::stable::Tensor& rows,
    const torch::stable::Tensor& stamp,
    const torch::stable::Tensor& control,
    const torch::stable::Tensor& epoch) {
  check_tensor(rows, "rows", 4, ScalarType::Int);
  check_tensor(stamp, "stamp", 2, ScalarType::Int);
  check_tensor(control, "control", 1, ScalarType::Int);
  check_tensor(epoch, "epoch", 0, ScalarType::Long);
  STD_TORCH_CHECK(rows.size(0) == 2 && rows.size(2) == 3, "rows must be [2, N, 3, n]");
  STD_TORCH_CHECK(stamp.size(0) == 2 && stamp.size(1) == rows.size(1), "stamp must be [2, N]");
  STD_TORCH_CHECK(control.size(0) >= 2, "control must have a counter and at least one lock");
}

inline RecordShape check_record(
    const torch::stable::Tensor& rows,
    const torch::stable::Tensor& stamp,
    const torch::stable::Tensor& control,
    const torch::stable::Tensor& epoch,
    const torch::stable::Tensor& sample_ids,
    const torch::stable::Tensor& prediction,
    const torch::stable::Tensor& labels,
    const torch::stable::Tensor& deviation) {
  check_memory(rows, stamp, control, epoch);
  check_tensor(sample_ids, "sample_ids", 1, ScalarType::Long);
  check_tensor(prediction, "prediction", 2, ScalarType::Long);
  check_tensor(labels, "labels", 2, ScalarType::Long);
  check_tensor(deviation, "deviation", 2, ScalarType::Float);
  const RecordShape shape{rows.size(1), rows.size(3), prediction.size(0), prediction.size(1)};
  STD_TORCH_CHECK(sample_ids.size(0) == shape.batch, "sample_ids must be [B]");
  for (const auto* other : {&labels, &deviation}) {
    STD_TORCH_CHECK(
        other->size(0) == shape.batch && other->size(1) == shape.length,
        "labels and deviation must have the shape of prediction");
  }
  STD_TORCH_CHECK(shape.length <= INT32_MAX, "a row must have fewer than 2^31 columns");
  return shape;
}

}  // namespace ntpseg
