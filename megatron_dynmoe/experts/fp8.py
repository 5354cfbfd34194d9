"""FP8 recipes: what shares a scale, which format it is cast to, and the cast itself.

A number x becomes float8(x * scale) * (1 / scale), where the scale maps the largest number of its group to the largest
that the format has.  The recipes differ in the group.  They are those of Transformer Engine (common/recipe), and one
with a scale a row, which is what torch's own grouped kernel takes.  The three GEMMs of a linear layer contract over
different dimensions, so a tensor is cast once for each use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {"e4m3": (E4M3, E4M3), "hybrid": (E4M3, E5M2)}  # forward, gradients
BLOCK = 128

Group = tuple[int | None, int | None]  # rows and columns that share a scale; None: all


class Groups(NamedTuple):
    """What shares a scale in each operand: of the rows for a GEMM that contracts over their columns (forward, and the
    gradient of the input) and over the rows themselves (the gradient of the weight); of a weight [O, I] forward, where
    I is contracted, and backward, where O is."""

    columns: Group
    rows: Group
    weight: Group
    weight_back: Group


_WHOLE: Group = (None, None)
GROUPS = {
    "delayed": Groups(_WHOLE, _WHOLE, _WHOLE, _WHOLE),
    "tensorwise": Groups(_WHOLE, _WHOLE, _WHOLE, _WHOLE),
    "blockwise": Groups((1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK), (BLOCK, BLOCK)),
    "rowwise": Groups((1, None), (None, 1), (1, None), (None, 1)),
}
RECIPES = tuple(GROUPS)


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """How the two linear layers of each expert are cast.

    A "tensor" is one expert's rows, its weight, or the gradients of its outputs, as in Transformer Engine's
    GroupedLinear, which has a quantiser for each GEMM (pytorch/module/grouped_linear.py).

    Args:
        scaling: "delayed", one scale a tensor, from the amax of earlier steps; "tensorwise", one from its own amax;
            "blockwise", powers of two for 1 x 128 of rows and 128 x 128 of weights (common/recipe Float8BlockScaling);
            "rowwise", one for each row of an operand, along the contracted dimension.
        format: "e4m3", or "hybrid" with gradients in e5m2.
        margin: the delayed scale is divided by 2 ** margin.
        amax_history_len: steps whose amax the delayed scale looks at, this one included.
        amax_compute_algo: "max" of them, or the "most_recent".
        wgrad: whether the gradient of the weights is computed in FP8, too.
    """

    scaling: str
    format: str = "hybrid"
    margin: int = 0
    amax_history_len: int = 1
    amax_compute_algo: str = "most_recent"
    wgrad: bool = True

    @property
    def groups(self) -> Groups:
        """What shares a scale."""
        return GROUPS[self.scaling]

    @property
    def forward_dtype(self) -> torch.dtype:
        """Of rows and weights."""
        return FORMATS[self.format][0]

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the gradients of outputs."""
        return FORMATS[self.format][1]

    @property
    def power_of_two(self) -> bool:
        """Whether scales are rounded down to powers of two."""
        return self.scaling == "blockwise"


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """The factor before the cast, as Transformer Engine's compute_scale_from_amax (common/recipe/recipe_common.cuh).

    Args:
        amax: float32, of any shape; where it is 0, infinite or NaN the factor is 1.
        power_of_two: round down to one.
    """
    scale = (torch.finfo(dtype).max / amax).clamp_max(torch.finfo(torch.float32).max)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def to_float8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale in ``dtype``; what is too large becomes the largest number, what is infinite or NaN becomes NaN.

    Transformer Engine's cast makes the largest number of an infinity, too, which hides it.

    Args:
        x: float32.
        scale: broadcasts to ``x``.
    """
    limit = torch.finfo(dtype).max
    return torch.where(x.isfinite(), (x * scale).clamp(-limit, limit), torch.nan).to(dtype)


def cast(
    x: Tensor, group: Group, dtype: torch.dtype, *, scale: Tensor | None = None, power_of_two: bool = False
) -> Tensor:
    """``x`` through float8 and back.

    Args:
        x: [H, W], H and W at least 1.
        group: rows and columns that share a scale; the last ones may be fewer.
        scale: of all of ``x``; default: from the amax of each group.
        power_of_two: round scales down to powers of two.

    Returns:
        float32 [H, W].
    """
    x = x.float()
    if scale is not None:
        return to_float8(x, scale, dtype).float() * scale.reciprocal()
    height, width = x.shape
    rows, columns = group[0] or height, group[1] or width
    if height % rows or width % columns:
        x = torch.nn.functional.pad(x, (0, -width % columns, 0, -height % rows))
    blocks = x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    scale = scale_of(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype, power_of_two=power_of_two)
    return (to_float8(blocks, scale, dtype).float() * scale.reciprocal()).view(x.shape)[:height, :width]
