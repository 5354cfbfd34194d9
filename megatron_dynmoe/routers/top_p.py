"""The top-p rule of Dynamic MoE: the smallest set of experts whose probability exceeds p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.ranges import Range
from megatron_dynmoe.routers.registry import register_preset, register_rule
from megatron_dynmoe.routers.settings import Settings, setting

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class TopP(Settings):
    """Settings of rule 'top-p'."""

    top_p: float = setting(0.4, Range(0, 1), exported="top_p_threshold", symbol="p")
    """Probability mass p in [0, 1] that a token's experts must exceed under rule 'top-p': 0 keeps the best expert
    alone, 1 keeps all of them."""


@register_rule("top-p", settings=TopP)
def top_p_map(scores_TE: Tensor, config: RouterConfig) -> Tensor:
    """The smallest set of experts whose probability exceeds --moe-top-p (Dynamic MoE).

    Huang et al. 2024, arXiv 2403.07652, eq. 3-4.  In descending order of probability, an expert stays iff the sum of
    those *before* it is at most p: the expert that crosses p stays, so p = 0 is top-1 and p = 1 keeps all (the public
    code's comparison, modeling_moe.py).  Ties keep the lower expert index first.

    Args:
        scores_TE: float32 probabilities; each row sums to one.
        config: ``top_p``.

    Returns:
        bool [T, E], at least one True a row, also for a row with NaN: its best expert stays, so that the NaN reaches
        the loss and is reported there.
    """
    if config.top_p == 0:  # spares the sort
        best_T1 = scores_TE.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, best_T1, True)
    sorted_TE, order_TE = scores_TE.detach().sort(dim=-1, descending=True, stable=True)
    # Not summed into a view: torch.compile breaks its graph there.
    before_TE = torch.nn.functional.pad(sorted_TE[:, :-1].cumsum(dim=-1), (1, 0))
    # Rounding can carry the sum past 1, where p = 1 must still keep everything.
    keep_TE = before_TE.clamp_(max=1.0) <= config.top_p
    keep_TE[:, 0] = True
    return torch.zeros_like(keep_TE).scatter(-1, order_TE, keep_TE)


# Huang et al. 2024, arXiv 2403.07652: p = 0.4, alpha = 1e-2, beta = 1e-4, raw probabilities as weights.
register_preset("dynamic-moe", {"rule": "top-p", "top_p": 0.4, "load_balance_coeff": 1e-2, "entropy_coeff": 1e-4})
