"""Matrix products on a CPU, by the faster of the two libraries that torch brings.

Torch multiplies float32 by MKL.  On AMD's cores oneDNN, which torch multiplies bfloat16 by, is twice as fast.  oneDNN
compiles code for each new shape, which costs some 0.2 ms, and keeps that of the last 1024.  Ragged groups would make it
compile for ever.  So their number of rows is rounded up to one of a few, with rows of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What TorchInductor calls for a linear layer on a CPU (torch/_inductor/mkldnn_ir.py); None in a torch without oneDNN.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# Elements of a weight from which a call into oneDNN, which costs more than one into MKL, pays.
_SMALLEST_WEIGHT = 1 << 14
_HALF = (torch.bfloat16, torch.float16)


def linear(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T: [M, I] and [O, I] to [M, O], of one dtype; no autograd."""
    if in_onednn(x_MI, weight_OI) and x_MI.dtype == torch.float32:
        return _ONEDNN(x_MI, weight_OI, None, "none", [], "")  # type: ignore[misc]
    return x_MI @ weight_OI.t()


def in_onednn(x_MI: Tensor, weight_OI: Tensor) -> bool:
    """Whether :func:`linear` of these is done in oneDNN, which wants rows in multiples of :func:`row_step`."""
    return (
        _ONEDNN is not None
        and x_MI.dtype == weight_OI.dtype
        and (x_MI.dtype == torch.float32 or x_MI.dtype in _HALF)
        and weight_OI.numel() >= _SMALLEST_WEIGHT
    )


def row_step(rows: int) -> int:
    """What ``rows`` is rounded up to a multiple of: 16, or a power of two that is at most a 32nd of it."""
    return max(16, 1 << max(0, rows.bit_length() - 6))


def padded(rows: Tensor, length: int) -> Tensor:
    """[M, ...] with zeros behind it up to ``length``; as it is where there is nothing to add."""
    if rows.shape[0] == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - rows.shape[0], *rows.shape[1:])])
