"""What a tensor of megatron consists of, as data that is read in both directions.

It is brought to a form, and each exported tensor is an index of that: the export reads the index, the import assigns to
it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """An exported tensor, `shape` its shape, at `index` of megatron's tensor in its form."""

    name: str
    shape: tuple[int, ...]
    index: Any = ...


@dataclass(frozen=True)
class Row:
    """A tensor of megatron and the exported tensors in it.

    Attributes:
        keys: its names, of which a checkpoint has one; the import writes the first. A layer's follow `decoder.layers.`.
        layer: of a transformer layer, counted from 0.
        shape: `None` for the vocabulary's rows, which are padded.
        parts: what is in none of them is not exported: padding, inactive slots.
        form: what the indices are of; `None`: the shape.
        by_expert: whether the first axis, of shape and form and all indices, is that of the experts.
    """

    keys: tuple[str, ...]
    layer: int | None
    shape: tuple[int | None, ...]
    parts: tuple[Part, ...]
    form: tuple[int, ...] | None = None
    by_expert: bool = False

    def export(self, tensor: Tensor) -> dict[str, Tensor]:
        """The exported tensors, views where they can be, of megatron's."""
        shaped = tensor if self.form is None else tensor.reshape(self.form)
        return {part.name: shaped[part.index].reshape(part.shape) for part in self.parts}

    def fill(self, tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Write the exported tensors into megatron's, which is contiguous; the inverse of :meth:`export`."""
        shaped = tensor if self.form is None else tensor.view(self.form)
        for part in self.parts:
            shaped[part.index] = read(part.name).to(tensor.dtype).reshape(shaped[part.index].shape)
        return tensor

    def expert(self, slot: int) -> "Row":
        """The row of one expert, by its slot; without parts if the slot was inactive."""
        mine = tuple(replace(part, index=part.index[1:]) for part in self.parts if part.index[0] == slot)
        return replace(self, shape=self.shape[1:], parts=mine, form=(self.form or ())[1:] or None, by_expert=False)
