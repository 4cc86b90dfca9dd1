// The CUDA implementations of ntpseg._C's operators, as the module ntpseg._C_cuda, over PyTorch's stable ABI.
#include "../module.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <tuple>

#include "../tensors.h"
#include "topn.h"

namespace ntpseg {
namespace {

void check_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(
        other->is_cuda() && other->get_device_index() == first.get_device_index(),
        "all tensors must be on one CUDA device, got devices ",
        first.get_device_index(),
        " and ",
        other->get_device_index());
  }
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(int error) { STD_TORCH_CHECK(error == 0, "ntpseg: CUDA launch failed: ", error_text(error)); }

void check_limits(int64_t length, int64_t n) {
  STD_TORCH_CHECK(
      length <= kMaxLength && n <= kMaxN,
      "the CUDA operator must get T <= 16384 and n <= 256, got T = ",
      length,
      " and n = ",
      n);
}

std::tuple<Tensor, Tensor> topn_errors(const Tensor& deviation, const Tensor& is_error, int64_t n) {
  const auto [rows, length] = check_topn(deviation, is_error, n);
  check_limits(length, n);
  check_device(deviation, {&deviation, &is_error});
  const torch::stable::accelerator::DeviceGuard guard(deviation.get_device_index());
  const auto [value, index] = empty_topn(deviation, rows, n);
  const TopnArguments arguments{
      data<const float>(deviation),
      data<const uint8_t>(is_error),
      data<float>(value),
      data<int32_t>(index),
      rows,
      static_cast<int>(length),
      static_cast<int>(n)};
  check_launch(launch_topn(arguments, current_stream(deviation)));
  return {value, index};
}

void record_errors(
    const Tensor& rows,
    const Tensor& stamp,
    const Tensor& control,
    const Tensor& epoch,
    const Tensor& sample_ids,
    const Tensor& prediction,
    const Tensor& labels,
    const Tensor& deviation,
    int64_t ignore_index) {
  const RecordInputs in = check_record(rows, stamp, control, epoch, sample_ids, prediction, labels, deviation);
  check_limits(in.length, in.n);
  check_device(rows, {&rows, &stamp, &control, &epoch, &sample_ids, &prediction, &labels, &deviation});
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const RecordArguments arguments{
      in.deviation,
      in.prediction,
      in.labels,
      in.sample_ids,
      data<const int64_t>(epoch),
      data<int32_t>(rows),
      data<int32_t>(stamp),
      data<int32_t>(control),
      in.batch,
      in.samples,
      ignore_index,
      static_cast<int>(in.length),
      static_cast<int>(in.n),
      static_cast<int>(control.size(0) - 1)};
  check_launch(launch_record(arguments, current_stream(rows)));
}

}  // namespace
}  // namespace ntpseg

STABLE_TORCH_LIBRARY_IMPL(ntpseg, CUDA, m) {
  m.impl("topn_errors", TORCH_BOX(&ntpseg::topn_errors));
  m.impl("record_errors", TORCH_BOX(&ntpseg::record_errors));
}

NTPSEG_MODULE(_C_cuda)
