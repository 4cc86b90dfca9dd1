// The loss operators of ntpseg._C for the CPU. They serve the torch backend of the loss, which checks shapes and offers
// the same in plain PyTorch wherever they are not usable.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "loss.h"

namespace ntpseg {
namespace {

using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

int64_t loss_cpu_level(const Tensor&) { return loss_level(); }

// tile [C, T] float, its rows anywhere; anchor, top, total [C] float; best [C] int64.
void loss_exponentials(
    const Tensor& tile, const Tensor& anchor, const Tensor& top, const Tensor& best, const Tensor& total, int64_t first) {
  STD_TORCH_CHECK(tile.dim() == 2 && tile.scalar_type() == ScalarType::Float && tile.stride(1) == 1, "tile must be [C, T]");
  const int64_t rows = tile.size(0), length = tile.size(1), stride = tile.stride(0);
  for (const auto* vector : {&anchor, &top, &total}) check_tensor(*vector, "a row vector", 1, ScalarType::Float);
  check_tensor(best, "best", 1, ScalarType::Long);
  const ExponentialsRow exponentials_row = exponentials_row_for_this_cpu();
  STD_TORCH_CHECK(exponentials_row != nullptr, "needs AVX2 with FMA, or AVX-512");
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      exponentials_row(
          data<float>(tile) + r * stride, length, data<float>(anchor)[r], static_cast<int32_t>(first),
          data<float>(top)[r], data<int64_t>(best)[r], data<float>(total)[r]);
    }
  });
}

BlockShape shape_of(const Tensor& hidden, const Tensor& matrix, const Tensor& block) {
  for (const auto* tensor : {&hidden, &matrix, &block}) {
    STD_TORCH_CHECK(
        tensor->dim() == 2 && tensor->scalar_type() == ScalarType::BFloat16 && tensor->stride(1) == 1,
        "hidden, matrix and block must be bfloat16 matrices with contiguous rows");
  }
  STD_TORCH_CHECK(hidden.size(1) == matrix.size(1) && hidden.size(1) % 32 == 0, "D must be a multiple of 32");
  STD_TORCH_CHECK(
      block.size(0) == 0 || (block.size(0) == hidden.size(0) && block.size(1) == matrix.size(0)), "block must be [R, V]");
  STD_TORCH_CHECK(matrix.size(0) < INT32_MAX, "V must be below 2^31");
  STD_TORCH_CHECK(loss_level() >= 2, "needs AMX with bfloat16");
  return {hidden.size(0), matrix.size(0), hidden.size(1), hidden.stride(0), matrix.stride(0), block.stride(0)};
}

// hidden [R, D], matrix [V, D] bfloat16; anchor, exact [R] float; column [R] int64; block [R, V] bfloat16 or [0, 0].
std::tuple<Tensor, Tensor, Tensor> loss_block(
    const Tensor& hidden,
    const Tensor& matrix,
    const Tensor& anchor,
    const Tensor& column,
    const Tensor& exact,
    const Tensor& block) {
  const BlockShape shape = shape_of(hidden, matrix, block);
  check_tensor(anchor, "anchor", 1, ScalarType::Float);
  check_tensor(exact, "exact", 1, ScalarType::Float);
  check_tensor(column, "column", 1, ScalarType::Long);
  Tensor packed = torch::stable::new_empty(hidden, {padded(shape.rows), shape.width});
  Tensor tops = torch::stable::new_empty(anchor, {kSlices, shape.rows});
  Tensor totals = torch::stable::new_empty(anchor, {kSlices, shape.rows});
  Tensor bests = torch::stable::new_empty(column, {kSlices, shape.rows});
  amx_pack_rows(data<bfloat16>(hidden), shape, data<bfloat16>(packed));
  torch::stable::parallel_for(0, kSlices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      amx_exponentials(
          slice, data<bfloat16>(packed), data<bfloat16>(matrix), shape, data<float>(anchor), data<int64_t>(column),
          data<float>(exact), block.size(0) ? data<bfloat16>(block) : nullptr, data<float>(tops) + slice * shape.rows,
          data<int64_t>(bests) + slice * shape.rows, data<float>(totals) + slice * shape.rows);
    }
  });
  Tensor top = torch::stable::new_empty(anchor, {shape.rows});
  Tensor total = torch::stable::new_empty(anchor, {shape.rows});
  Tensor best = torch::stable::new_empty(column, {shape.rows});
  for (int64_t r = 0; r < shape.rows; ++r) {
    float highest = data<float>(tops)[r], sum = 0;
    int64_t where = data<int64_t>(bests)[r];
    for (int64_t slice = 0; slice < kSlices; ++slice) {
      const int64_t i = slice * shape.rows + r;
      sum += data<float>(totals)[i];
      if (data<float>(tops)[i] > highest) highest = data<float>(tops)[i], where = data<int64_t>(bests)[i];
    }
    data<float>(top)[r] = highest;
    data<float>(total)[r] = sum;
    data<int64_t>(best)[r] = where;
  }
  return {top, best, total};
}

// block [R, V], matrix [V, D] bfloat16 -> block @ matrix, [R, D] float (a narrow view of padded rows).
Tensor loss_hidden_gradient(const Tensor& block, const Tensor& matrix, const Tensor& hidden, const Tensor& like) {
  const BlockShape shape = shape_of(hidden, matrix, block);
  Tensor out = torch::stable::new_empty(like, {padded(shape.rows), shape.width});
  const int64_t panels = padded(shape.rows) / 32;
  const int64_t grain = std::max<int64_t>(1, (panels + torch::stable::get_num_threads() - 1) / torch::stable::get_num_threads());
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    amx_hidden_gradient(32 * begin, 32 * end, data<bfloat16>(block), data<bfloat16>(matrix), shape, data<float>(out));
  });
  return torch::stable::narrow(out, 0, 0, shape.rows);
}

// d_matrix [V, D] float (+)= block.T @ scaled; block [R, V], scaled [R, D] bfloat16.
void loss_weight_gradient(
    const Tensor& block, const Tensor& scaled, const Tensor& matrix, const Tensor& d_matrix, bool add) {
  const BlockShape shape = shape_of(scaled, matrix, block);
  check_tensor(d_matrix, "d_matrix", 2, ScalarType::Float);
  STD_TORCH_CHECK(d_matrix.size(0) == shape.classes && d_matrix.size(1) == shape.width, "d_matrix must be [V, D]");
  Tensor packed = torch::stable::new_empty(scaled, {padded(shape.rows), shape.width});
  amx_pack_pairs(data<bfloat16>(scaled), shape, data<bfloat16>(packed));
  torch::stable::parallel_for(0, padded(shape.classes) / 32, 16, [&](int64_t begin, int64_t end) {
    amx_weight_gradient(begin, end, data<bfloat16>(block), data<bfloat16>(packed), shape, data<float>(d_matrix), add);
  });
}

}  // namespace
}  // namespace ntpseg

STABLE_TORCH_LIBRARY_FRAGMENT(ntpseg, m) {
  m.def("loss_cpu_level(Tensor any) -> int");
  m.def(
      "loss_exponentials(Tensor(a!) tile, Tensor anchor, Tensor(b!) top, Tensor(c!) best, Tensor(d!) total, int first) "
      "-> ()");
  m.def(
      "loss_block(Tensor hidden, Tensor matrix, Tensor anchor, Tensor column, Tensor exact, Tensor(a!) block) "
      "-> (Tensor top, Tensor best, Tensor total)");
  m.def("loss_hidden_gradient(Tensor block, Tensor matrix, Tensor hidden, Tensor like) -> Tensor");
  m.def("loss_weight_gradient(Tensor block, Tensor scaled, Tensor matrix, Tensor(a!) d_matrix, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ntpseg, CPU, m) {
  m.impl("loss_cpu_level", TORCH_BOX(&ntpseg::loss_cpu_level));
  m.impl("loss_exponentials", TORCH_BOX(&ntpseg::loss_exponentials));
  m.impl("loss_block", TORCH_BOX(&ntpseg::loss_block));
  m.impl("loss_hidden_gradient", TORCH_BOX(&ntpseg::loss_hidden_gradient));
  m.impl("loss_weight_gradient", TORCH_BOX(&ntpseg::loss_weight_gradient));
}
