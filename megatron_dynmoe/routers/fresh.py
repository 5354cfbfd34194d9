"""A router as it is when training starts: shapes and initial values of what it learns, drawn or only counted.

The planner has no model; what it says of one with any gate and rule it takes from the router's own functions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.routers.registry import GATES

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


def weight_shape(config: RouterConfig, columns: int, width: int) -> tuple[int, int]:
    """Of the router's weight, as the gate wants it."""
    shape = GATES[config.gate].weight_shape
    return (columns, width) if shape is None else shape(columns, width)


def learned(config: RouterConfig, columns: int, width: int) -> dict[str, Tensor | tuple[int, ...]]:
    """What gate and rule learn beside the weight: initial values, or shapes; ``gate_map`` of a gating residual."""
    found: dict[str, Tensor | tuple[int, ...]] = {}
    for method in config.methods:
        found |= {} if method.parameters is None else method.parameters(config, columns, width)
    if config.gating_residual:
        found["gate_map"] = (columns, columns)
    return found


def router_parameters(config: RouterConfig, experts: int, width: int) -> int:
    """How many numbers the router of a layer with so many FFN experts learns."""
    columns = experts + config.zero_computation_experts
    values = learned(config, columns, width).values()
    sizes = [value.numel() if isinstance(value, Tensor) else math.prod(value) for value in values]
    return math.prod(weight_shape(config, columns, width)) + sum(sizes)


def draw(config: RouterConfig, columns: int, width: int, std: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A new router's weight and parameters, float32; ``std`` is that of the model's initialisation.

    They come from torch's default generator on the CPU.
    """
    init, weight = GATES[config.gate].init_weight, torch.empty(weight_shape(config, columns, width), device="cpu")
    if init is None:
        weight.normal_(0.0, std)
    else:
        init(weight)
    parts = learned(config, columns, width).items()
    return weight, {n: v if isinstance(v, Tensor) else torch.empty(v, device="cpu").normal_(0.0, std) for n, v in parts}
