"""Triton helpers that the kernels share: constants, the interpreter switch, the epilogue over a tile of logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Read once, as Triton itself does when it decorates a kernel.
INTERPRETED: bool = triton.knobs.runtime.interpret
ON_INTERPRETER = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INT32_MAX = tl.constexpr(2147483647)
# An anchor above every logit: exp2 of the difference is exactly zero, so the dense part of the row vanishes.
FAR_ANCHOR = tl.constexpr(1.0e30)

# Per-row arguments of kernels that get some rows of a longer array. Where those begin depends on the batch (with a
# weight per head, on how many rows each head has): keyed on their alignment, a kernel would be compiled again for each.
ROW_POINTERS = (
    "anchor_ptr",
    "hard_tokens_ptr",
    "het_ptr",
    "index_ptr",
    "limit_ptr",
    "lse_ptr",
    "margin_ptr",
    "nll_ptr",
    "num_negatives_ptr",
    "prediction_ptr",
    "recompute_ptr",
    "row_weight_ptr",
    "scale_ptr",
    "target_logit_ptr",
    "target_ptr",
    "tcl_ptr",
)


def _patch_interpreter() -> None:
    """Lets a scalar be the bound of a loop: a one-element array there, which is no ``int`` to NumPy 2.5 and later.

    Triton 3.9 does the same in its own interpreter; 3.6 does not.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _patch_interpreter()


@triton.jit
def upcast_if_interpreted(x):
    """An operand of a product. The interpreter holds bf16 as raw integers and multiplies those: give it fp32."""
    if ON_INTERPRETER:
        x = x.to(tl.float32)
    return x


@triton.jit
def downcast(x, dtype: tl.constexpr):
    """fp32 to the dtype of a store, to the nearest. The interpreter truncates to bf16: round there beforehand."""
    if ON_INTERPRETER and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def anchored_exp(z, anchor, limit, column):
    """E of one tile and its contribution to each row's sum, maximum and arg-max.

    Args:
        z: ``[BLOCK_M, BLOCK_N]`` fp32 logits straight from the accumulators, -inf outside the vocabulary.
        anchor: ``[BLOCK_M]`` fp32, ``z_y * log2(e)``, rounded; the reduction knows the rounding error.
        limit: ``[BLOCK_M]`` fp32, logit above which the anchor would overflow E.
        column: ``[BLOCK_N]`` int32 class ids.

    Returns:
        e, sum, maximum, arg-max (lowest id on ties). Where the tile's maximum is above `limit` the tile takes that
        maximum as its anchor instead: E stays finite and the sum exact, and the row's E is recomputed afterwards.
    """
    row_max = tl.max(z, 1)
    argmax = tl.min(tl.where(z == row_max[:, None], column[None, :], INT32_MAX), 1)
    tile_anchor = tl.where(row_max > limit, row_max * LOG2E, anchor)
    # fused on every device: the reduction takes single entries out of the sum again and must find the same numbers
    e = tl.exp2(tl.fma(z, LOG2E, -tile_anchor[:, None]))
    return e, tl.sum(e, 1), row_max, argmax


@triton.jit
def rescale_factor(part_max, row_max, anchor, limit):
    """Factor that brings a sum taken at the anchor of a part of the row to that of the whole row, by their maxima."""
    part_anchor = tl.where(part_max > limit, part_max * LOG2E, anchor)
    row_anchor = tl.where(row_max > limit, row_max * LOG2E, anchor)
    return tl.exp2(part_anchor - row_anchor)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x >= 0 without losing small x (Kahan's correction of the rounded sum)."""
    rounded = 1.0 + x
    kept = rounded - 1.0
    return tl.where(kept == 0.0, x, tl.log(rounded) * (x / tl.where(kept == 0.0, 1.0, kept)))
