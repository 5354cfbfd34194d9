"""Rows in blocks that stay in a CPU's cache while several operations pass over them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def blocks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors side by side, ``rows`` rows at a time on a CPU; on a GPU, whose cache holds no block that would keep
    all of it busy, once as they are.

    Args:
        rows: at least 1.
        tensors: all of the same first dimension; views of them are handed out.
    """
    first = tensors[0]
    if first.device.type != "cpu":
        rows = max(1, first.shape[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
