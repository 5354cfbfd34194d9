"""The router of the Hugging Face DynMoE model: scores of the experts, and which of them a token gets.

Shape letters: `T` tokens of the batch, `D` hidden size, `E` experts. The decision is made in float32 whatever the
model's dtype: in bfloat16 scores near a threshold round to the other side, and a token gets another set of experts than
it was trained with.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def select_experts(probs_TE, config):
    """Chooses experts per token from router probabilities.

    Args:
        probs_TE: float32 softmax probabilities.
        config: `router_rule` with `top_p_threshold` or `num_experts_per_tok`, `max_experts_per_token`,
            `normalize_router_weights`.

    Returns:
        (weights_TE float32, map_TE bool). Weights are the kept probabilities and zero elsewhere. Every row of the map
        holds at least one expert; equally probable experts are kept in the order of their index.
    """
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    rank_E = torch.arange(probs_TE.shape[-1], device=probs_TE.device)
    if config.router_rule == "top-k":
        keep_TE = (rank_E < config.num_experts_per_tok).expand_as(sorted_TE)
    else:
        # The sum *before* each rank, shifted and not subtracted: subtraction would round at the threshold.
        before_TE = F.pad(sorted_TE.cumsum(dim=-1)[..., :-1], (1, 0))
        # A float32 sum can exceed one by its rounding, and p = 1 keeps all experts.
        keep_TE = before_TE.clamp(max=1.0) <= config.top_p_threshold
    if config.max_experts_per_token is not None:
        keep_TE = keep_TE & (rank_E < config.max_experts_per_token)
    map_TE = torch.zeros_like(keep_TE).scatter(-1, order_TE, keep_TE)
    weights_TE = probs_TE * map_TE
    if config.normalize_router_weights:
        weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
    return weights_TE, map_TE


def select_any(scores_TE, thresholds_E, config):
    """Chooses all experts whose score exceeds their threshold, or the one with the highest score if none does.

    Args:
        scores_TE: float32 scores in (0, 1).
        thresholds_E: float32, in the same range.
        config: `max_experts_per_token`: the highest scores stay.

    Returns:
        (weights_TE float32, map_TE bool): 1/k for each of a token's k experts.
    """
    map_TE = scores_TE > thresholds_E
    best_T1 = scores_TE.argmax(dim=-1, keepdim=True)
    map_TE = map_TE | torch.zeros_like(map_TE).scatter(-1, best_T1, ~map_TE.any(dim=-1, keepdim=True))
    if config.max_experts_per_token is not None:
        order_TE = scores_TE.masked_fill(~map_TE, -math.inf).sort(dim=-1, descending=True, stable=True).indices
        first_TE = order_TE[..., : config.max_experts_per_token]
        map_TE = map_TE & torch.zeros_like(map_TE).scatter(-1, first_TE, True)
    return map_TE.float() / map_TE.sum(dim=-1, keepdim=True), map_TE


class DynMoERouter(nn.Module):
    """Gate and selection rule, in float32: hidden [T, D] -> logits, weights and map, each [T, E].

    Gate "softmax" is linear; gate "cosine" scores the scaled cosine with each row of `weight` by a sigmoid, and rule
    "top-any" compares with the sigmoid of the equally scaled `thresholds`.
    """

    def __init__(self, config, experts):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.cosine = config.router_gate == "cosine"
        if config.router_rule == "top-any":
            self.thresholds = nn.Parameter(torch.empty(experts))
        if config.trained_cosine_scale:
            self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TD):
        # Autocast would compute the product in its own dtype.
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            if not self.cosine:
                logits_TE = F.linear(x_TD.float(), self.weight.float())
                return logits_TE, *select_experts(logits_TE.softmax(dim=-1), self.config)
            scale = self.logit_scale.float().exp().clamp(max=100.0) if self.config.trained_cosine_scale else None
            scale = self.config.cosine_scale if scale is None else scale
            norm_T1 = torch.linalg.vector_norm(x_TD.float(), dim=-1, keepdim=True).clamp_min(1e-12)
            direction_ED = F.normalize(self.weight.float(), dim=-1, eps=1e-12)
            logits_TE = scale * F.linear(x_TD.float(), direction_ED) / norm_T1
            if self.config.router_rule != "top-any":
                return logits_TE, *select_experts(logits_TE.sigmoid(), self.config)
            thresholds_E = (scale * self.thresholds.float()).sigmoid()
            return logits_TE, *select_any(logits_TE.sigmoid(), thresholds_E, self.config)
