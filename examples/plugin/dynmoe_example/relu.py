"""ReLU routing: a token visits the experts whose logit is positive, weighted by it (ReMoE, arXiv 2412.14711).

An L1 loss keeps the choice sparse.  Its coefficient moves by a constant factor after each step, towards the wanted
number of experts per token.  The paper has one coefficient for all layers; here each layer has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dynmoe.ranges import COEFFICIENT, Range
from megatron_dynmoe.routers.controller import Controller, Seen, State, Step
from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import Loss, Routed, register_gate, register_rule
from megatron_dynmoe.routers.settings import Settings, setting


@register_gate("relu", scores=torch.relu, probabilities=False)
def relu_gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """W x in float32; scores are its positive part."""
    return linear32(x_TD, weight_ED)


@dataclass(frozen=True, kw_only=True)
class ReLU(Settings):
    """Settings of rule 'relu'."""

    relu_experts: float = setting(2.0, Range(1, 65536))
    """Experts per token that the L1 loss of rule 'relu' leads to."""

    relu_l1_coeff: float = setting(1e-8, COEFFICIENT)
    """Weight of that loss at the start; it moves."""

    relu_l1_factor: float = setting(1.2, Range(1, 10))
    """What the weight is multiplied with, or divided by, after each step."""


class AdaptiveL1(Controller):
    """coefficient *= factor where tokens visit more experts than wanted, else /= factor (section 3.3)."""

    sets = ("relu_l1_coeff",)

    def state(self) -> dict[str, Tensor | float | list[int]]:
        """The coefficient."""
        return {"relu_l1_coeff": self.config.relu_l1_coeff}

    def counts(self) -> dict[str, Tensor]:
        """Tokens, and the experts they visited."""
        return {"tokens": torch.zeros((), dtype=torch.int64), "rows": torch.zeros((), dtype=torch.int64)}

    def observe(self, counts: State, seen: Seen) -> None:
        """Count one micro-batch."""
        counts["tokens"] += seen.valid_T.sum()
        counts["rows"] += seen.routing.map_TC.sum()

    def after_step(self, state: State, totals: State, step: Step) -> None:
        """Move the coefficient; at the wanted number it stays."""
        excess = (totals["rows"] - self.config.relu_experts * totals["tokens"]).sign()
        state["relu_l1_coeff"].mul_(self.config.relu_l1_factor**excess)


def weighted_l1(routed: Routed) -> Tensor:
    """(1/T) sum_t,e f_e R_te with f_e = E count_e / (k T): dense experts are pushed harder (eq. 12)."""
    scores_TC, rows_C, tokens = routed.routing.scores_TC, routed.totals.rows_C, routed.totals.tokens
    load_C = rows_C * len(rows_C) / (routed.config.relu_experts * tokens)
    return (load_C * scores_TC.sum(dim=0)).sum() / tokens


@register_rule(
    "relu",
    settings=ReLU,
    gates=("relu",),
    losses=(Loss("relu_l1_loss", "relu_l1_coeff", weighted_l1),),
    controller=AdaptiveL1,
    may_be_empty=True,
)
def relu_map(scores_TE: Tensor, config: object) -> Tensor:
    """Experts with a positive score; perhaps none."""
    return scores_TE > 0
