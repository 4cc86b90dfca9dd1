// The operators of ntpseg._C: their schemas and their CPU implementations, over PyTorch's stable ABI, so that one build
// serves every Python and PyTorch from 2.11 on.
#include "../module.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../tensors.h"
#include "merge.h"
#include "rank.h"

namespace ntpseg {
namespace {

// PyTorch's own grain: fewer columns than this per thread cost more to schedule than to do.
constexpr int64_t kColumnsPerTask = 32768;

int64_t rows_per_task(int64_t length) { return std::max<int64_t>(1, kColumnsPerTask / std::max<int64_t>(1, length)); }

Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

std::tuple<Tensor, Tensor> topn_errors(const Tensor& deviation, const Tensor& is_error, int64_t n) {
  const auto [rows, length] = check_topn(deviation, is_error, n);
  const auto [value, index] = empty_topn(deviation, rows, n);
  const auto* deviations = data<const float>(deviation);
  const auto* errors = data<const uint8_t>(is_error);
  auto* values = data<float>(value);
  auto* indices = data<int32_t>(index);
  const RankRow rank_row = rank_row_for_this_cpu();
  torch::stable::parallel_for(0, rows, rows_per_task(length), [&, length = length](int64_t begin, int64_t end) {
    Scratch& scratch = thread_scratch();
    for (int64_t row = begin; row < end; ++row) {
      float* v = values + row * n;
      int32_t* i = indices + row * n;
      const int64_t count = rank_row(deviations + row * length, errors + row * length, length, n, scratch, v, i);
      std::fill(v + count, v + n, -std::numeric_limits<float>::infinity());
      std::fill(i + count, i + n, -1);
    }
  });
  return {value, index};
}

MemoryView view_of(const Tensor& rows, const Tensor& stamp, const Tensor& control, const Tensor& epoch) {
  return {
      data<int32_t>(rows),
      data<int32_t>(stamp),
      data<int32_t>(control),
      control.size(0) - 1,
      rows.size(1),
      rows.size(3),
      *data<const int64_t>(epoch)};
}

void merge_entries(
    const Tensor& rows,
    const Tensor& stamp,
    const Tensor& control,
    const Tensor& epoch,
    const Tensor& sample_ids,
    const Tensor& entries) {
  check_memory(rows, stamp, control, epoch);
  check_tensor(sample_ids, "sample_ids", 1, ScalarType::Long);
  check_tensor(entries, "entries", 3, ScalarType::Int);
  const bool fits = entries.size(0) == sample_ids.size(0) && entries.size(1) == 3;
  check_shape(fits, entries, "entries", "be [B, 3, m] with sample_ids [B]");
  const MemoryView memory = view_of(rows, stamp, control, epoch);
  const auto* ids = data<const int64_t>(sample_ids);
  const auto* source = data<const int32_t>(entries);
  const int64_t slots = entries.size(2);
  torch::stable::parallel_for(0, sample_ids.size(0), rows_per_task(slots), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      merge_into(memory, ids[row], read_entries(source + row * 3 * slots, slots));
    }
  });
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
  const MemoryView memory = view_of(rows, stamp, control, epoch);
  const RankRow rank_row = rank_row_for_this_cpu();
  torch::stable::parallel_for(0, in.batch, rows_per_task(in.length), [&](int64_t begin, int64_t end) {
    Scratch& scratch = thread_scratch();
    scratch.is_error.resize(in.length);
    Entries entries(in.n);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t* predicted = in.prediction + row * in.length;
      const int64_t* target = in.labels + row * in.length;
      for (int64_t i = 0; i < in.length; ++i) {
        scratch.is_error[i] =
            (predicted[i] >= 0) & (target[i] != ignore_index) & (predicted[i] != target[i]);
      }
      entries.size = rank_row(
          in.deviation + row * in.length,
          scratch.is_error.data(),
          in.length,
          in.n,
          scratch,
          entries.deviation.data(),
          entries.position.data());
      for (int64_t i = 0; i < entries.size; ++i) {
        entries.token[i] = static_cast<int32_t>(predicted[entries.position[i]]);
      }
      merge_into(memory, in.sample_ids[row], entries);
    }
  });
}

}  // namespace
}  // namespace ntpseg

STABLE_TORCH_LIBRARY_FRAGMENT(ntpseg, m) {
  m.def("topn_errors(Tensor deviation, Tensor is_error, int n) -> (Tensor value, Tensor index)");
  m.def(
      "record_errors(Tensor(a!) rows, Tensor(b!) stamp, Tensor(c!) control, Tensor epoch, Tensor sample_ids, "
      "Tensor prediction, Tensor labels, Tensor deviation, int ignore_index) -> ()");
  m.def(
      "merge_entries(Tensor(a!) rows, Tensor(b!) stamp, Tensor(c!) control, Tensor epoch, Tensor sample_ids, "
      "Tensor entries) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ntpseg, CPU, m) {
  m.impl("topn_errors", TORCH_BOX(&ntpseg::topn_errors));
  m.impl("record_errors", TORCH_BOX(&ntpseg::record_errors));
  m.impl("merge_entries", TORCH_BOX(&ntpseg::merge_entries));
}

NTPSEG_MODULE(_C)
