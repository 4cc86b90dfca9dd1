// The loss operators of ntpseg._C for the CPU. They serve the torch backend of the loss, which checks shapes and offers
// the same in plain PyTorch wherever they are not usable.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "loss.h"

namespace ntpseg {
namespace {

int64_t loss_cpu_level(const Tensor&) { return loss_level(); }

// tile [C, T] float, its rows anywhere; anchor, row_max, row_sum [C] float; argmax [C] int64.
void loss_exponentials(
    const Tensor& tile,
    const Tensor& anchor,
    const Tensor& row_max,
    const Tensor& argmax,
    const Tensor& row_sum,
    int64_t first) {
  const bool fits = tile.dim() == 2 && tile.scalar_type() == ScalarType::Float && tile.stride(1) == 1;
  check_shape(fits, tile, "tile", "be float [C, T] with contiguous rows");
  const int64_t rows = tile.size(0), length = tile.size(1), stride = tile.stride(0);
  for (const auto* vector : {&anchor, &row_max, &row_sum}) check_tensor(*vector, "a row vector", 1, ScalarType::Float);
  check_tensor(argmax, "argmax", 1, ScalarType::Long);
  const ExponentialsRow exponentials_row = exponentials_row_for_this_cpu();
  STD_TORCH_CHECK(exponentials_row != nullptr, "the processor must have AVX2 with FMA, or AVX-512");
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      exponentials_row(
          data<float>(tile) + r * stride, length, data<float>(anchor)[r], static_cast<int32_t>(first),
          data<float>(row_max)[r], data<int64_t>(argmax)[r], data<float>(row_sum)[r]);
    }
  });
}

BlockShape shape_of(const Tensor& hidden, const Tensor& weight, const Tensor& block) {
  for (const auto* tensor : {&hidden, &weight, &block}) {
    const bool fits = tensor->dim() == 2 && tensor->scalar_type() == ScalarType::BFloat16 && tensor->stride(1) == 1;
    check_shape(fits, *tensor, "each of hidden, weight and block", "be a bfloat16 matrix with contiguous rows");
  }
  check_shape(hidden.size(1) % 32 == 0, hidden, "hidden", "be [R, D] with D a multiple of 32");
  check_shape(hidden.size(1) == weight.size(1), weight, "weight", "be [V, D] with hidden [R, D]");
  const bool fits = block.size(0) == hidden.size(0) && block.size(1) == weight.size(0);
  check_shape(block.size(0) == 0 || fits, block, "block", "be [R, V] with hidden [R, D] and weight [V, D], or empty");
  check_shape(weight.size(0) < INT32_MAX, weight, "weight", "be [V, D] with V below 2^31");
  STD_TORCH_CHECK(loss_level() >= 2, "the processor must have AMX with bfloat16");
  return {hidden.size(0), weight.size(0), hidden.size(1), hidden.stride(0), weight.stride(0), block.stride(0)};
}

// hidden [R, D], weight [V, D] bfloat16; anchor, target_logit [R] float; target_column [R] int64; block [R, V] bfloat16
// or [0, 0].
std::tuple<Tensor, Tensor, Tensor> loss_block(
    const Tensor& hidden,
    const Tensor& weight,
    const Tensor& anchor,
    const Tensor& target_column,
    const Tensor& target_logit,
    const Tensor& block) {
  const BlockShape shape = shape_of(hidden, weight, block);
  check_tensor(anchor, "anchor", 1, ScalarType::Float);
  check_tensor(target_logit, "target_logit", 1, ScalarType::Float);
  check_tensor(target_column, "target_column", 1, ScalarType::Long);
  Tensor packed = torch::stable::new_empty(hidden, {padded(shape.rows), shape.width});
  Tensor slice_max = torch::stable::new_empty(anchor, {kSlices, shape.rows});
  Tensor slice_sum = torch::stable::new_empty(anchor, {kSlices, shape.rows});
  Tensor slice_argmax = torch::stable::new_empty(target_column, {kSlices, shape.rows});
  amx_pack_rows(data<bfloat16>(hidden), shape, data<bfloat16>(packed));
  torch::stable::parallel_for(0, kSlices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      amx_exponentials(
          slice,
          data<bfloat16>(packed),
          data<bfloat16>(weight),
          shape,
          data<float>(anchor),
          data<int64_t>(target_column),
          data<float>(target_logit),
          block.size(0) ? data<bfloat16>(block) : nullptr,
          data<float>(slice_max) + slice * shape.rows,
          data<int64_t>(slice_argmax) + slice * shape.rows,
          data<float>(slice_sum) + slice * shape.rows);
    }
  });
  Tensor row_max = torch::stable::new_empty(anchor, {shape.rows});
  Tensor row_sum = torch::stable::new_empty(anchor, {shape.rows});
  Tensor argmax = torch::stable::new_empty(target_column, {shape.rows});
  for (int64_t r = 0; r < shape.rows; ++r) {
    float max = data<float>(slice_max)[r], sum = 0;
    int64_t arg = data<int64_t>(slice_argmax)[r];
    for (int64_t slice = 0; slice < kSlices; ++slice) {
      const int64_t i = slice * shape.rows + r;
      sum += data<float>(slice_sum)[i];
      if (data<float>(slice_max)[i] > max) max = data<float>(slice_max)[i], arg = data<int64_t>(slice_argmax)[i];
    }
    data<float>(row_max)[r] = max;
    data<float>(row_sum)[r] = sum;
    data<int64_t>(argmax)[r] = arg;
  }
  return {row_max, argmax, row_sum};
}

// block [R, V], weight [V, D] bfloat16 -> block @ weight, [R, D] float (a narrow view of padded rows).
Tensor loss_hidden_gradient(const Tensor& block, const Tensor& weight, const Tensor& hidden, const Tensor& like) {
  const BlockShape shape = shape_of(hidden, weight, block);
  Tensor out = torch::stable::new_empty(like, {padded(shape.rows), shape.width});
  const int64_t panels = padded(shape.rows) / 32;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t grain = std::max<int64_t>(1, (panels + threads - 1) / threads);
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    amx_hidden_gradient(32 * begin, 32 * end, data<bfloat16>(block), data<bfloat16>(weight), shape, data<float>(out));
  });
  return torch::stable::narrow(out, 0, 0, shape.rows);
}

// d_weight [V, D] float (+)= block.T @ scaled; block [R, V], scaled [R, D] bfloat16.
void loss_weight_gradient(
    const Tensor& block, const Tensor& scaled, const Tensor& weight, const Tensor& d_weight, bool add) {
  const BlockShape shape = shape_of(scaled, weight, block);
  check_tensor(d_weight, "d_weight", 2, ScalarType::Float);
  const bool fits = d_weight.size(0) == shape.classes && d_weight.size(1) == shape.width;
  check_shape(fits, d_weight, "d_weight", "be [V, D] as weight is");
  Tensor packed = torch::stable::new_empty(scaled, {padded(shape.rows), shape.width});
  amx_pack_pairs(data<bfloat16>(scaled), shape, data<bfloat16>(packed));
  torch::stable::parallel_for(0, padded(shape.classes) / 32, 16, [&](int64_t begin, int64_t end) {
    amx_weight_gradient(begin, end, data<bfloat16>(block), data<bfloat16>(packed), shape, data<float>(d_weight), add);
  });
}

}  // namespace
}  // namespace ntpseg

STABLE_TORCH_LIBRARY_FRAGMENT(ntpseg, m) {
  m.def("loss_cpu_level(Tensor any) -> int");
  m.def(
      "loss_exponentials(Tensor(a!) tile, Tensor anchor, Tensor(b!) row_max, Tensor(c!) argmax, Tensor(d!) row_sum, "
      "int first) -> ()");
  m.def(
      "loss_block(Tensor hidden, Tensor weight, Tensor anchor, Tensor target_column, Tensor target_logit, "
      "Tensor(a!) block) -> (Tensor row_max, Tensor argmax, Tensor row_sum)");
  m.def("loss_hidden_gradient(Tensor block, Tensor weight, Tensor hidden, Tensor like) -> Tensor");
  m.def("loss_weight_gradient(Tensor block, Tensor scaled, Tensor weight, Tensor(a!) d_weight, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ntpseg, CPU, m) {
  m.impl("loss_cpu_level", TORCH_BOX(&ntpseg::loss_cpu_level));
  m.impl("loss_exponentials", TORCH_BOX(&ntpseg::loss_exponentials));
  m.impl("loss_block", TORCH_BOX(&ntpseg::loss_block));
  m.impl("loss_hidden_gradient", TORCH_BOX(&ntpseg::loss_hidden_gradient));
  m.impl("loss_weight_gradient", TORCH_BOX(&ntpseg::loss_weight_gradient));
}
