"""Scales between steps, and casts of a shard of a weight: ``csrc/extensions/recipe.cpp`` and its neighbours."""

from typing import Any

import torch

from transformer_engine_torch.dtypes import to_torch
from transformer_engine_torch.quantize import BLOCK, cast


def compute_amax(tensor: torch.Tensor, amax: torch.Tensor) -> None:
    amax.copy_(tensor.abs().amax().float() if tensor.numel() else torch.zeros(()))


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: torch.Tensor,
    amax_histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Delayed scaling (common/recipe/delayed_scaling.cu): histories [length, tensors] move on, scales follow.

    The reduced amax takes the place of the oldest, row 0 is zeroed for the next step, and the scale is that of the
    largest or of the latest. Where there is no amax, or one that is not finite, the scale stays.
    """
    largest = torch.finfo(to_torch(fp8_dtype)).max
    start = 0
    for history, scale in zip(amax_histories, scales, strict=True):
        latest = amax_reduction_buffer[start : start + scale.numel()]
        latest = torch.where(latest != 0, latest, history[0])
        start += scale.numel()
        seen = torch.cat([latest[None], history[1:]])
        amax = seen.amax(0) if amax_compute_algo == "max" else latest
        rolled = seen.roll(-1, 0)
        rolled[0] = 0
        history.copy_(rolled)
        new = largest / amax / 2**margin
        new = torch.where(torch.isinf(new), torch.full_like(new, torch.finfo(torch.float32).max), new)
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), new, scale))


def _tiles_of(start: int, count: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each number of a flat piece of a matrix the row and the column of its 128 x 128 tile."""
    place = torch.arange(start, start + count)
    return place // columns // BLOCK, place % columns // BLOCK


def fp8_block_scaling_compute_partial_amax(
    tensor: torch.Tensor, amax: torch.Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Largest magnitudes of tiles, seen from a flat piece of the matrix [h, w]."""
    row, column = _tiles_of(start_offset, tensor.numel(), w)
    flat = amax.view(-1)
    flat.zero_()
    flat.scatter_reduce_(0, row * amax.shape[1] + column, tensor.abs().float().flatten(), "amax")


def fp8_block_scaling_partial_cast(
    inp: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    h: int,
    w: int,
    start_offset: int,
    block_len: int,
    out_dtype: Any,
) -> None:
    """A flat piece of the matrix [h, w] into bytes, by its tiles' scales."""
    row, column = _tiles_of(start_offset, inp.numel(), w)
    out.copy_(cast(inp.flatten(), scale[row, column], to_torch(out_dtype)).view(out.shape))


def fused_multi_row_padding(inp: torch.Tensor, output: torch.Tensor, rows: list[int], padded_rows: list[int]) -> None:
    """Each expert's rows, followed by zeros up to ``padded_rows``."""
    output.zero_()
    parts = zip(inp.split(rows), output.split(padded_rows), strict=True)
    for source, target in parts:
        target[: len(source)] = source


def fused_multi_row_unpadding(inp: torch.Tensor, output: torch.Tensor, padded_rows: list[int], rows: list[int]) -> None:
    """Each expert's first ``rows``."""
    for source, target in zip(inp.split(padded_rows), output.split(rows), strict=True):
        target.copy_(source[: len(target)])
