"""A method outside of the library, with what an export has to bring along: a helper, a setting, state, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from megatron_dynmoe.ranges import Range
from megatron_dynmoe.routers import register_gate, register_rule
from megatron_dynmoe.routers.controller import Controller
from megatron_dynmoe.routers.settings import Settings, setting

from .a_helper import shifted

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class Floor(Settings):
    """Settings of rule 'floor'."""

    floor: float = setting(0.2, Range(0, 1))
    """Score that an expert needs."""

    floor_coeff: float = setting(0.0, Range(0, 1), training=True)
    """Of a loss."""


class FloorController(Controller):
    """Moves the floor."""

    sets: ClassVar[tuple[str, ...]] = ("floor",)

    def state(self) -> dict[str, Tensor]:
        """The floor, and what is for training alone."""
        return {"floor": torch.tensor(self.config.floor), "floor_error": torch.zeros(())}


@register_gate("biased", parameters=lambda config, experts, width: {"bias": torch.zeros(experts)})
def biased_gate(x_TD: Tensor, weight_ED: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    """W x + b."""
    return shifted(x_TD.float() @ weight_ED.float().t(), parameters["bias"])


@register_rule("floor", settings=Floor, controller=FloorController, may_be_empty=True)
def floor_map(scores_TE: Tensor, config: RouterConfig) -> Tensor:
    """Experts whose score passes the floor."""
    return scores_TE > config.floor
