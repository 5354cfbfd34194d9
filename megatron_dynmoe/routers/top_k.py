"""The top-k rule: the k most probable experts.  Switch is k = 1, GShard k = 2 with normalised weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.ranges import COUNT
from megatron_dynmoe.routers.registry import register_rule
from megatron_dynmoe.routers.settings import Settings, setting

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class TopK(Settings):
    """Settings of rule 'top-k'."""

    topk: int = setting(2, COUNT, megatron="moe_router_topk", exported="num_experts_per_tok")
    """Experts per token under rule 'top-k'."""


@register_rule("top-k", settings=TopK)
def top_k_map(scores_TE: Tensor, config: RouterConfig) -> Tensor:
    """The ``config.topk`` most probable experts of each token (all of them if there are fewer).

    Args:
        scores_TE: float32 probabilities.
        config: ``topk``.

    Returns:
        bool [T, E] with min(topk, E) True entries a row.
    """
    best_TK = scores_TE.topk(min(config.topk, scores_TE.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, best_TK, True)
