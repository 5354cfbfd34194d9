"""Top-p whose threshold a PI controller moves, so that the mean of experts per token meets a target.

After DTop-p (arXiv 2512.13996), which has one p for all layers and the error (wanted - mean experts) / E.  Here each
layer has its own p, so that a layer's state is all there is to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.ranges import Range
from megatron_dynmoe.routers.controller import Controller, Seen, State, Step
from megatron_dynmoe.routers.registry import register_rule
from megatron_dynmoe.routers.settings import setting
from megatron_dynmoe.routers.top_p import TopP, top_p_map

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class PITopP(TopP):
    """Settings of rule 'pi-top-p'; --moe-top-p is where p starts."""

    target_experts: float = setting(2.0, Range(1, 65536))
    """FFN experts per token, in the mean of a step, that rule 'pi-top-p' aims at."""

    pi_proportional: float = setting(0.5, Range(0, 100))
    """Gain of the change of the error; the error is (target - mean) / experts."""

    pi_integral: float = setting(0.05, Range(0, 100))
    """Gain of the error itself."""


class PIController(Controller):
    """p += proportional * (error - last error) + integral * error, within [0, 1]: PI in its incremental form."""

    sets = ("top_p",)

    def state(self) -> dict[str, Tensor | float | list[int]]:
        """p, and the error of the last step."""
        return {"top_p": self.config.top_p, "last_error": 0.0}

    def counts(self) -> dict[str, Tensor]:
        """Tokens, and the FFN experts they visited."""
        return {"tokens": torch.zeros((), dtype=torch.int64), "rows": torch.zeros((), dtype=torch.int64)}

    def observe(self, counts: State, seen: Seen) -> None:
        """Count one micro-batch."""
        counts["tokens"] += seen.valid_T.sum()
        counts["rows"] += seen.routing.map_TE.sum()

    def after_step(self, state: State, totals: State, step: Step) -> None:
        """Move p against the error of this step."""
        experts = self.columns - self.config.zero_computation_experts
        mean = totals["rows"] / totals["tokens"].clamp_min(1)
        error = (self.config.target_experts - mean) / experts
        change = self.config.pi_proportional * (error - state["last_error"]) + self.config.pi_integral * error
        state["top_p"].add_(change).clamp_(0, 1)
        state["last_error"].copy_(error)


@register_rule("pi-top-p", settings=PITopP, controller=PIController)
def pi_top_p_map(scores_TE: Tensor, config: RouterConfig) -> Tensor:
    """Top-p with the p of the moment.

    Args:
        scores_TE: float32 probabilities.
        config: ``top_p``, as the controller has moved it.

    Returns:
        bool [T, E], at least one True a row.
    """
    return top_p_map(scores_TE, config)
