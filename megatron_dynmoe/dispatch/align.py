"""Row alignment for FP8: each expert's group filled up with zero rows, where it is computed.

FP8 GEMMs want groups of a multiple of 16 rows (32 for mxfp8).  megatron-core reaches that by turning zeros of the
routing map into ones, so that padding crosses the network and is counted as routing.  Here map and plan stay as they
are: zero rows with weight zero are added behind each group after the dispatch, and taken out before the combine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def aligned_sizes(rows_per_expert_L: Sequence[int], multiple: int) -> list[int]:
    """Each size rounded up to a multiple of ``multiple``; 0 stays 0."""
    return [-(-rows // multiple) * multiple for rows in rows_per_expert_L]


def align_rows(rows: Tensor, rows_per_expert_L: Sequence[int], multiple: int) -> Tensor:
    """[N, ...] ordered by expert to [N', ...] with zeros behind each group."""
    pieces = []
    wanted = aligned_sizes(rows_per_expert_L, multiple)
    for group, size in zip(rows.split(list(rows_per_expert_L)), wanted, strict=True):
        pieces += [group, group.new_zeros(size - group.shape[0], *group.shape[1:])]
    return torch.cat(pieces)


def unalign_rows(rows: Tensor, rows_per_expert_L: Sequence[int], multiple: int) -> Tensor:
    """The reverse of :func:`align_rows`."""
    groups = rows.split(aligned_sizes(rows_per_expert_L, multiple))
    return torch.cat([group[:size] for group, size in zip(groups, rows_per_expert_L, strict=True)])
