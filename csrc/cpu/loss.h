// The loss on x86 processors: exponentials with their reductions, and the products of bfloat16 on AMX tiles.
#pragma once

#include <cstdint>

namespace ntpseg {

// What this processor and kernel allow: 0 nothing, 1 `exponentials_row` (AVX2 with FMA, or AVX-512), 2 also AMX with
// bfloat16. NTPSEG_CPU_ISA=baseline|avx2|avx512 asks for no more than that; only the last one leaves AMX.
int loss_level();

// One row of a tile of logits in place: z becomes exp(z - anchor), and the row's maximum (of z - anchor), its column
// (counted from `column`) and the sum are brought up to date.
using ExponentialsRow = void (*)(
    float* z, int64_t length, float anchor, int32_t column, float& row_max, int64_t& argmax, float& row_sum);

namespace avx512 {
void exponentials_row(float*, int64_t, float, int32_t, float&, int64_t&, float&);
}
namespace avx2 {
void exponentials_row(float*, int64_t, float, int32_t, float&, int64_t&, float&);
}

// The fastest of them that `loss_level` allows, null where it is 0.
ExponentialsRow exponentials_row_for_this_cpu();

// bfloat16 matrices are row-major with a leading dimension; R rows, V classes, D features, D a multiple of 32.
using bfloat16 = uint16_t;

struct BlockShape {
  int64_t rows, classes, width;
  int64_t hidden_stride, weight_stride, block_stride;
};

// The number of independent slices along V of `amx_exponentials`; fixed, so that sums do not depend on threads.
constexpr int64_t kSlices = 16;

constexpr int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

// hidden [R, D] -> A tiles; `packed` holds padded(R) * D.
void amx_pack_rows(const bfloat16* hidden, const BlockShape& shape, bfloat16* packed);

// Slice s of exp(z - anchor): writes its columns of `block` unless that is null, and its reductions [R]. The logit of
// target_column[r] is taken to be target_logit[r].
void amx_exponentials(
    int64_t slice,
    const bfloat16* packed_hidden,
    const bfloat16* weight,
    const BlockShape& shape,
    const float* anchor,
    const int64_t* target_column,
    const float* target_logit,
    bfloat16* block,
    float* row_max,
    int64_t* argmax,
    float* row_sum);

// d_hidden[begin:end] = block @ weight, fp32, [padded(R), D]; begin and end are multiples of 32 (or end is padded(R)).
void amx_hidden_gradient(
    int64_t begin,
    int64_t end,
    const bfloat16* block,
    const bfloat16* weight,
    const BlockShape& shape,
    float* d_hidden);

// scaled [R, D] -> B tiles; `packed` holds padded(R) * D.
void amx_pack_pairs(const bfloat16* scaled, const BlockShape& shape, bfloat16* packed);

// d_weight[32 * begin : 32 * end] (+)= block.T @ scaled, fp32 [V, D], in panels of 32 classes.
void amx_weight_gradient(
    int64_t begin,
    int64_t end,
    const bfloat16* block,
    const bfloat16* packed_scaled,
    const BlockShape& shape,
    float* d_weight,
    bool add);

}  // namespace ntpseg
