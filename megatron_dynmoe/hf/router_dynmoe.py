"""The router of the Hugging Face DynMoE model: scores of the experts, and which of them a token gets.

Shape letters: `T` tokens of the batch, `D` hidden size, `E` feed-forward experts, `Z` zero-computation experts and
`C` = E + Z columns of the router. What chooses among experts does not care of which kind they are: it says `E` for all.
The decision is made in float32 whatever the model's dtype: in bfloat16 scores near a threshold round to the other side,
and a token gets another set of experts than it was trained with.
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


def norm_logits(logits_TC, std):
    """Each token's logits divided by (their unbiased standard deviation / `std`)."""
    return logits_TC / (logits_TC.std(dim=-1, keepdim=True) / std).clamp_min(torch.finfo(logits_TC.dtype).tiny)


def weights_without_zero(logits_TC, map_TC, zero_experts):
    """Weights [T, C] in which zero experts, the last columns, have none: a softmax over the token's other experts.

    Taken of the logits and not of probabilities, it is finite also where these underflow. A token that chose zero
    experts alone has no weight at all.
    """
    kept_TC = map_TC.clone()
    kept_TC[:, map_TC.shape[1] - zero_experts :] = False
    masked_TC = logits_TC.masked_fill(~kept_TC, -math.inf).masked_fill(~kept_TC.any(dim=-1, keepdim=True), 0.0)
    return masked_TC.softmax(dim=-1).masked_fill(~kept_TC, 0.0)


class CarriedLogits:
    """Router logits of one forward pass, by layer: a mixture's router reads those of the mixture before it.

    Each forward pass of the model makes one and hands it to its layers as a keyword argument. So nothing stays behind
    between passes or steps of generation, threads that share a model do not see each other's, and the hidden states
    are those of any decoder. Being a plain object it goes through hooks that move tensors between devices (which copy
    dictionaries), and keeping the logits of every layer it serves a layer that gradient checkpointing runs again.
    """

    def __init__(self):
        self.by_layer = {}

    def before(self, layer):
        """The logits [T, C] of the last mixture before `layer`, or None."""
        earlier = [index for index in self.by_layer if index < layer]
        return self.by_layer[max(earlier)] if earlier else None


class DynMoERouter(nn.Module):
    """Gate and selection rule, in float32.

    Gate "softmax" is linear; gate "tanh" has a hidden layer of 8 C units; gate "cosine" scores the scaled cosine with
    each row of `weight` by a sigmoid, and rule "top-any" compares with the sigmoid of the equally scaled `thresholds`.
    With a gating residual, `gate_map` [C, C] of the previous mixture's logits is added; the first mixture has none.
    """

    def __init__(self, config, experts, first=True):
        super().__init__()
        self.config = config
        self.experts = experts
        columns = experts + config.zero_experts + config.copy_experts + config.constant_experts
        hidden = 8 * columns if config.router_gate == "tanh" else None
        self.weight = nn.Parameter(torch.empty(columns, hidden or config.hidden_size))
        if hidden:
            self.hidden_weight = nn.Parameter(torch.empty(hidden, config.hidden_size))
        if config.gating_residual and not first:
            self.gate_map = nn.Parameter(torch.empty(columns, columns))
        self.cosine = config.router_gate == "cosine"
        if config.router_rule == "top-any":
            self.thresholds = nn.Parameter(torch.empty(columns))
        if config.trained_cosine_scale:
            self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TD, previous_TC=None):
        """Routes tokens.

        Args:
            x_TD: hidden states of any float dtype.
            previous_TC: the previous mixture's logits, for the gating residual; None in the first mixture.

        Returns:
            (logits_TC, weights_TE, map_TE, free_weights_TZ, free_map_TZ): logits with the gating residual, as the next
            mixture reads them; weights and choice of the feed-forward and of the zero-computation experts.
        """
        # Autocast would compute the product in its own dtype.
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            scale = self.scale()
            logits_TC = self.gate(x_TD.float(), scale)
            if previous_TC is not None:
                # The previous layer may live on another device.
                logits_TC = logits_TC + F.linear(previous_TC.to(logits_TC.device), self.gate_map.float())
            weights_TC, map_TC = self.select(logits_TC, scale)
        parts = (table.tensor_split([self.experts], dim=-1) for table in (weights_TC, map_TC))
        (weights_TE, free_weights_TZ), (map_TE, free_map_TZ) = parts
        return logits_TC, weights_TE, map_TE, free_weights_TZ, free_map_TZ

    def scale(self):
        """The scale of cosines and thresholds."""
        if self.config.trained_cosine_scale:
            return self.logit_scale.float().exp().clamp(max=100.0)
        return self.config.cosine_scale

    def gate(self, x_TD, scale):
        """Logits [T, C] of float32 hidden states, without the gating residual."""
        weight = self.weight.float()
        if self.cosine:
            norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).clamp_min(1e-12)
            return scale * F.linear(x_TD, F.normalize(weight, dim=-1, eps=1e-12)) / norm_T1
        if self.config.router_gate == "tanh":
            x_TD = F.linear(x_TD, self.hidden_weight.float()).tanh()
        return F.linear(x_TD, weight)

    def select(self, logits_TC, scale):
        """Weights and map, [T, C] each; what is carried to the next mixture stays un-normed."""
        config = self.config
        if config.logits_norm_std is not None:
            logits_TC = norm_logits(logits_TC, config.logits_norm_std)
        scores_TC = logits_TC.sigmoid() if self.cosine else logits_TC.softmax(dim=-1)
        if config.router_rule == "top-any":
            return select_any(scores_TC, (scale * self.thresholds.float()).sigmoid(), config)
        weights_TC, map_TC = select_experts(scores_TC, config)
        if config.drop_zero_weight:
            weights_TC = weights_without_zero(logits_TC, map_TC, config.zero_experts)
        return weights_TC, map_TC
