"""Row alignment for FP8: each expert's group filled up with zero rows, where it is computed.

FP8 GEMMs want groups of a multiple of 16 rows (32 for mxfp8).  megatron-core reaches that by turning zeros of the
routing map into ones, so that padding crosses the network and is counted as routing.  Here map and plan stay as they
are: zero rows with weight zero are added behind each group after the dispatch, and taken out before the combine.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_dynmoe.dispatch.moves import put_rows, take_rows


def aligned_sizes(rows_per_expert_L: Sequence[int], multiple: int) -> list[int]:
    """Each size rounded up to a multiple of ``multiple``; 0 stays 0."""
    return [-(-rows // multiple) * multiple for rows in rows_per_expert_L]


def align_rows(rows: Tensor, rows_per_expert_L: Sequence[int], multiple: int) -> Tensor:
    """[N, ...] ordered by expert to [N', ...] with zeros behind each group."""
    index_N = _places(rows_per_expert_L, multiple, rows.device)
    return put_rows(rows, index_N, sum(aligned_sizes(rows_per_expert_L, multiple)))


def unalign_rows(rows: Tensor, rows_per_expert_L: Sequence[int], multiple: int) -> Tensor:
    """The reverse of :func:`align_rows`."""
    return take_rows(rows, _places(rows_per_expert_L, multiple, rows.device))


def _places(rows_per_expert_L: Sequence[int], multiple: int, device: torch.device) -> Tensor:
    """int64 [N]: where each row stands among the aligned ones. As many kernels for 2 experts as for 200."""
    padding_L = [-rows % multiple for rows in rows_per_expert_L]
    before_L = [0, *accumulate(padding_L[:-1])]
    shift_L, rows_L = torch.tensor([before_L, list(rows_per_expert_L)]).to(device, non_blocking=True)
    rows = sum(rows_per_expert_L)
    return torch.repeat_interleave(shift_L, rows_L, output_size=rows) + torch.arange(rows, device=device)
