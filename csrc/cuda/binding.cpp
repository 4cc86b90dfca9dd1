// The CUDA implementations of ntpseg._C's operators, as the module ntpseg._C_cuda, over PyTorch's stable ABI.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <tuple>

#include "../checks.h"
#include "topn.h"

namespace ntpseg {
namespace {

using torch::stable::Tensor;

void check_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(
        other->is_cuda() && other->get_device_index() == first.get_device_index(),
        "all tensors must be on one CUDA device");
  }
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(int error) { STD_TORCH_CHECK(error == 0, "ntpseg: CUDA launch failed: ", error_text(error)); }

std::tuple<Tensor, Tensor> topn_errors(const Tensor& deviation, const Tensor& is_error, int64_t n) {
  const auto [rows, length] = check_topn(deviation, is_error, n);
  STD_TORCH_CHECK(length <= kMaxLength && n <= kMaxN, "the CUDA operator takes T <= 16384 and n <= 256");
  check_device(deviation, {&deviation, &is_error});
  const torch::stable::accelerator::DeviceGuard guard(deviation.get_device_index());
  Tensor value = torch::stable::new_empty(deviation, {rows, n});
  Tensor index = torch::stable::new_empty(deviation, {rows, n}, ScalarType::Int);
  const TopnArguments arguments{
      static_cast<const float*>(deviation.data_ptr()),
      static_cast<const uint8_t*>(is_error.data_ptr()),
      static_cast<float*>(value.data_ptr()),
      static_cast<int32_t*>(index.data_ptr()),
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
  const RecordShape shape = check_record(rows, stamp, control, epoch, sample_ids, prediction, labels, deviation);
  STD_TORCH_CHECK(shape.length <= kMaxLength && shape.n <= kMaxN, "the CUDA operator takes T <= 16384 and n <= 256");
  check_device(rows, {&rows, &stamp, &control, &epoch, &sample_ids, &prediction, &labels, &deviation});
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const RecordArguments arguments{
      static_cast<const float*>(deviation.data_ptr()),
      static_cast<const int64_t*>(prediction.data_ptr()),
      static_cast<const int64_t*>(labels.data_ptr()),
      static_cast<const int64_t*>(sample_ids.data_ptr()),
      static_cast<const int64_t*>(epoch.data_ptr()),
      static_cast<int32_t*>(rows.data_ptr()),
      static_cast<int32_t*>(stamp.data_ptr()),
      static_cast<int32_t*>(control.data_ptr()),
      shape.batch,
      shape.samples,
      ignore_index,
      static_cast<int>(shape.length),
      static_cast<int>(shape.n),
      static_cast<int>(control.size(0) - 1)};
  check_launch(launch_record(arguments, current_stream(rows)));
}

}  // namespace
}  // namespace ntpseg

STABLE_TORCH_LIBRARY_IMPL(ntpseg, CUDA, m) {
  m.impl("topn_errors", TORCH_BOX(&ntpseg::topn_errors));
  m.impl("record_errors", TORCH_BOX(&ntpseg::record_errors));
}

extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
