"""The n hardest errors of each row: one definition, a plain PyTorch path and the native op behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from ntpseg.ops.extension import usable
from ntpseg.utils.checks import check_integer
from ntpseg.utils.tensor_checks import check_device, check_tensor

# What the CUDA kernels hold on chip; beyond it the plain path serves.
CUDA_MAX_LENGTH = 16384
CUDA_MAX_N = 256
MAX_N = 2**31 - 1  # columns are int32

_NOT_AN_ERROR = torch.iinfo(torch.int64).min
_LOW_WORD = 0xFFFFFFFF


def ordered_bits(value: Tensor) -> Tensor:
    """Map float32 to int64 keys that compare as the floats do (NaN as +inf, -0 as +0).

    Args:
        value: float32, any shape.

    Returns:
        int64 of the same shape, within the int32 range.
    """
    bits = canonical(value).view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF) - 1)


def canonical(value: Tensor) -> Tensor:
    """Return ``value`` as float32 with NaN replaced by +inf and -0 by +0: the form in which deviations are ranked."""
    value = value.float()
    return torch.where(value.isnan(), torch.inf, value) + 0.0


def topn_errors(deviation: Tensor, is_error: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n largest deviations among the errors of each row.

    A deviation is ranked as float32. NaN counts as +inf and is returned as +inf: a model that has diverged at a token
    is as wrong there as can be. An error whose deviation is -inf is still an error and precedes the padding.

    Args:
        deviation: ``[B, T]`` floating point, how far each prediction is from the truth.
        is_error: ``[B, T]`` bool, which of them are errors at all.
        n: number of slots per row, from 0 to 2**31 - 1; it may exceed the number of errors and T. All of them are in
            the result, which takes ``8 B n`` bytes.

    Returns:
        ``(value, index)``: float32 and int32, each ``[B, n]``, in descending order, ties to the lowest index, -inf and
        -1 in the slots that no error fills. Neither carries a gradient.

    Raises:
        ValueError: a type, shape, dtype or device does not fit, or n is no integer within its limits.
    """
    _check(deviation, is_error, n)
    if not native_serves(deviation.device.type, deviation.shape[1], n):
        return plain_topn_errors(deviation, is_error, n)
    return torch.ops.ntpseg.topn_errors(ready(deviation), is_error.contiguous(), n)


def native_serves(device_type: str, length: int, n: int) -> bool:
    """Tell whether the native operators take rows of this length and n slots."""
    if device_type == "cuda" and (length > CUDA_MAX_LENGTH or n > CUDA_MAX_N):
        return False
    return usable(device_type)


def ready(deviation: Tensor) -> Tensor:
    """Return a deviation as the native operators take it: float32, contiguous and without a gradient."""
    if deviation.requires_grad:
        deviation = deviation.detach()
    return deviation.float().contiguous()


def plain_topn_errors(deviation: Tensor, is_error: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Compute `topn_errors` with PyTorch operators alone (any device, any size); arguments are not checked."""
    deviation = canonical(deviation.detach())
    rows, length = deviation.shape
    column = torch.arange(length, device=deviation.device)
    # The column in the low word makes every key distinct, so that no tie is left for topk to break as it likes.
    key = torch.where(is_error, (ordered_bits(deviation) << 32) | (_LOW_WORD - column), _NOT_AN_ERROR)
    top, _ = key.topk(min(n, length), dim=1)
    filled = top != _NOT_AN_ERROR
    column = torch.where(filled, _LOW_WORD - (top & _LOW_WORD), 0)
    value = deviation.new_full((rows, n), -torch.inf)
    index = torch.full((rows, n), -1, dtype=torch.int32, device=deviation.device)
    value[:, : top.shape[1]] = torch.where(filled, deviation.gather(1, column), -torch.inf)
    index[:, : top.shape[1]] = torch.where(filled, column, -1).int()
    return value, index


def _check(deviation: Tensor, is_error: Tensor, n: int) -> None:
    check_tensor("deviation", deviation, "float", ("B", "T"))
    check_tensor("is_error", is_error, "bool", tuple(deviation.shape))
    check_device("is_error", is_error, "deviation", deviation.device)
    check_integer("n", n, 0, MAX_N)
