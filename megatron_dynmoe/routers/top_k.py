"""The top-k rule: the k most probable experts.  Switch is k = 1, GShard k = 2 with normalised weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.ranges import COUNT
from megatron_dynmoe.routers.registry import register_preset, register_rule
from megatron_dynmoe.routers.settings import Settings, setting

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class TopK(Settings):
    """Settings of rule 'top-k'."""

    topk: int = setting(2, COUNT, megatron="moe_router_topk", exported="num_experts_per_tok", symbol="k")
    """Experts per token under rule 'top-k'."""

    def check_columns(self, config: RouterConfig, experts: int) -> None:
        """There must be as many."""
        columns = experts + config.zero_computation_experts
        self.require("topk", self.topk <= columns, f"1 to {columns}, as there are {columns} experts")


@register_rule("top-k", settings=TopK, most=lambda config: config.topk)
def top_k_map(scores_TE: Tensor, config: RouterConfig) -> Tensor:
    """The --moe-router-topk most probable experts: Switch with 1, GShard with 2; all of them if there are fewer.

    Args:
        scores_TE: float32 probabilities.
        config: ``topk``.

    Returns:
        bool [T, E] with min(topk, E) True entries a row.
    """
    best_TK = scores_TE.topk(min(config.topk, scores_TE.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, best_TK, True)


# Fedus et al. 2021, arXiv 2101.03961: one expert, weighted by its probability; alpha = 1e-2.
register_preset("switch", {"rule": "top-k", "topk": 1, "load_balance_coeff": 1e-2})
# Lepikhin et al. 2020, arXiv 2006.16668: two experts, weights normalised over the pair.
register_preset("gshard", {"rule": "top-k", "topk": 2, "normalize_weights": True, "load_balance_coeff": 1e-2})
