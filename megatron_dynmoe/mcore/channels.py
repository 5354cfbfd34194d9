"""Logits as channels of the hidden tensor, which carries them from layer to layer, through recompute and pipelines.

In a bfloat16 model a float32 number takes two channels, the rounded value and the rounded rest, so that 16 bits of
its mantissa arrive; gradients come back the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channels_of(columns: int, dtype: torch.dtype) -> int:
    """Channels that ``columns`` float32 logits take in a tensor of ``dtype``."""
    return columns * (1 if dtype in (torch.float32, torch.float64) else 2)


def _split(wide: Tensor, dtype: torch.dtype) -> Tensor:
    high = wide.to(dtype)
    return torch.cat([high, (wide - high.to(wide.dtype)).to(dtype)], dim=-1)


def _join(pair: Tensor) -> Tensor:
    high, low = pair.float().chunk(2, dim=-1)
    return high + low


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wide: Tensor, dtype: torch.dtype) -> Tensor:
        return _split(wide, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _join(grad), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pair: Tensor) -> Tensor:
        ctx.dtype = pair.dtype
        return _join(pair)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _split(grad, ctx.dtype)


def pack(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 logits [..., C] as channels of ``dtype``: [..., C], or [..., 2C] where ``dtype`` is narrower."""
    return logits.to(dtype) if channels_of(1, dtype) == 1 else _Pack.apply(logits, dtype)


def unpack(channels: Tensor) -> Tensor:
    """The logits again, float32 [..., C]."""
    return channels if channels_of(1, channels.dtype) == 1 else _Unpack.apply(channels)
