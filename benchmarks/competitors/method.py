"""What every method offers to the clock, the memory meter and the comparison of gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.competitors.case import Case


class NotPossible(Exception):
    """A method cannot run a case, in one sentence."""


@dataclass(frozen=True)
class Wire:
    """What one rank puts into the exchanges of one forward pass; the backward pass moves the same rows again.

    Attributes:
        rows: rows handed to the dispatch, those that stay on the rank included.
        bytes: bytes that leave the rank: rows out and back, and the routing weights that travel with them.
    """

    rows: int
    bytes: int

    @classmethod
    def of(cls, case: Case, rows_R: list[int], *, weights_per_row: int) -> Wire:
        """From the rows for each rank, each sent with ``weights_per_row`` float32 weights."""
        away = sum(rows_R) - rows_R[case.rank]
        row_bytes = 2 * case.x_TD.shape[1] * case.x_TD.element_size() + 4 * weights_per_row
        return cls(sum(rows_R), away * row_bytes)


class Method(ABC):
    """One way through the layer, over one case.

    Attributes:
        x_TD, weights_TE: leaves that get gradients; they share memory with the case.
        parameters: the leaves that hold the local experts' weights, in a layout that is the method's own.
    """

    name: str

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x_TD = leaf(case.x_TD)
        self.weights_TE = leaf(case.weights_TE)
        self.parameters: list[Tensor] = []

    @abstractmethod
    def forward(self) -> Tensor:
        """The layer's output [T, D]."""

    @abstractmethod
    def expert_grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of the local experts after :meth:`step`: fc1 [L, 2F, D] and fc2 [L, D, F]."""

    @abstractmethod
    def wire(self) -> Wire:
        """What the last forward pass sent."""

    def step(self) -> Tensor:
        """What is timed: planning, dispatch, experts, combine, and all of it backwards."""
        out = self.forward()
        out.backward(self.case.grad_TD)
        return out

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (self.x_TD, self.weights_TE, *self.parameters):
            tensor.grad = None


class StackedMethod(Method):
    """A method whose parameters are the two stacked weights of the case."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.parameters = [leaf(case.fc1_LGD), leaf(case.fc2_LDF)]

    def expert_grads(self) -> tuple[Tensor, Tensor]:
        fc1, fc2 = self.parameters
        return fc1.grad, fc2.grad


def leaf(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that collects a gradient."""
    return tensor.detach().requires_grad_()


def swiglu(hidden: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F], gate first."""
    gate, up = hidden.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
