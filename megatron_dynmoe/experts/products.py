"""Matrix products on a CPU, by the faster of the two libraries that torch brings.

Torch multiplies float32 by MKL.  On AMD's cores oneDNN, which torch multiplies bfloat16 by, is twice as fast.  oneDNN
compiles code for each new shape, which costs some 0.2 ms, and keeps that of the last 1024.  Ragged groups would make it
compile for ever.  So their number of rows is rounded up to one of a few, with rows of zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What TorchInductor calls for a linear layer on a CPU (torch/_inductor/mkldnn_ir.py); None in a torch without oneDNN.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# Elements of a weight from which a call into oneDNN, which costs more than one into MKL, pays.
_SMALLEST_WEIGHT = 1 << 14
_HALF = (torch.bfloat16, torch.float16)


Product = Callable[[Tensor, Tensor], Tensor]


def product_for(rows: Tensor, weight: Tensor) -> tuple[Product, bool]:
    """What multiplies rows by such weights: x W^T of [M, I] and [O, I], without autograd.

    Returns:
        the function; and whether it is done in oneDNN, which wants rows in multiples of :func:`row_step`.
    """
    large = _ONEDNN is not None and weight.numel() >= _SMALLEST_WEIGHT and rows.dtype == weight.dtype
    if large and rows.dtype == torch.float32:
        return _by_onednn, True
    return _by_torch, large and rows.dtype in _HALF


def _by_onednn(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    return _ONEDNN(x_MI, weight_OI, None, "none", [], "")  # type: ignore[misc]


def _by_torch(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_MI @ weight_OI.t()


def row_step(rows: int) -> int:
    """What ``rows`` is rounded up to a multiple of: 16, or a power of two that is at most a 32nd of it."""
    return max(16, 1 << max(0, rows.bit_length() - 6))


def padded(rows: Tensor, length: int) -> Tensor:
    """[M, ...] with zeros behind it up to ``length``; as it is where there is nothing to add."""
    if rows.shape[0] == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - rows.shape[0], *rows.shape[1:])])
