"""A router end to end: gate, rule, bounds, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.routers.registry import GATES, NONE, RULES
from megatron_dynmoe.routing import Routing

if TYPE_CHECKING:
    from megatron_dynmoe.config import DynMoEConfig


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    config: DynMoEConfig,
    *,
    parameters: Mapping[str, Tensor] = NONE,
    active_E: Tensor | None = None,
    training: bool = True,
) -> Routing:
    """Route each token: which experts, with what weight.

    Args:
        x_TD: hidden states, any float dtype.
        weight_ED: the router's weight.
        config: gate, rule, bounds and normalisation.
        parameters: what gate and rule learn beside the weight, by name.
        active_E: bool, the experts that there are to choose from; unset: all.
        training: hold the memory guard's bound on rows, and let a token visit nobody where the rule says so. In
            evaluation neither is done: there a token's experts must not depend on the other tokens of the batch, and a
            rule's empty choice is replaced by the active expert with the highest score.

    Returns:
        Routing, float32. Gradients reach ``x_TD`` and the parameters through the weights; the choice itself has none.
    """
    gate, rule = GATES[config.gate], RULES[config.rule]
    logits_TE, scores_TE = gate(x_TD, weight_ED, config, parameters)
    with torch.no_grad():
        open_TE = scores_TE if active_E is None else scores_TE.masked_fill(~active_E, -torch.inf)
        chosen_TE = rule(open_TE, config, parameters)
        if rule.may_be_empty and not training:
            chosen_TE = chosen_TE | best_of_none(chosen_TE, open_TE)
        map_TE = cap_experts(chosen_TE, scores_TE, config.max_experts_per_token)
        if training:
            map_TE = cap_rows(map_TE, scores_TE, row_bound(map_TE.shape[0], config))
        cut = chosen_TE.sum() - map_TE.sum()
    if rule.weights is None:
        weights_TE = finish_weights(scores_TE, map_TE, normalize=config.normalize_weights)
    else:
        weights_TE = rule.weights(scores_TE, map_TE, config, parameters)
    return Routing(weights_TE=weights_TE, map_TE=map_TE, scores_TE=scores_TE, logits_TE=logits_TE, cut=cut)


def best_of_none(map_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """bool [T, E]: the expert with the highest score for each token whose row of the map is empty."""
    best_T1 = scores_TE.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(map_TE).scatter(-1, best_T1, ~map_TE.any(dim=-1, keepdim=True))


def row_bound(num_tokens: int, config: DynMoEConfig) -> int | None:
    """The memory guard's bound on rows for ``num_tokens`` tokens; ``None`` for no bound."""
    bounds = [config.max_rows] if config.max_rows is not None else []
    if config.max_rows_per_token is not None:
        bounds.append(int(config.max_rows_per_token * num_tokens))
    return max(min(bounds), num_tokens) if bounds else None


def cap_experts(map_TE: Tensor, scores_TE: Tensor, cap: int | None) -> Tensor:
    """Keep at most ``cap`` chosen experts a token, the most probable ones.

    Args:
        map_TE: bool, what a rule chose.
        scores_TE: float32; ties keep the lower expert index.
        cap: at least 1, or None for no bound.
    """
    if cap is None or cap >= map_TE.shape[-1]:
        return map_TE
    chosen_TE = scores_TE.masked_fill(~map_TE, -torch.inf)
    order_TE = chosen_TE.sort(dim=-1, descending=True, stable=True).indices
    within_TE = torch.zeros_like(map_TE).scatter(-1, order_TE[:, :cap], True)
    return map_TE & within_TE


def cap_rows(map_TE: Tensor, scores_TE: Tensor, bound: int | None) -> Tensor:
    """Keep at most ``bound`` assignments: each token's best, then the most probable of the others.

    Args:
        map_TE: bool.
        scores_TE: float32.
        bound: at least the number of tokens, or ``None``. Known on the host, so nothing waits for the device.
    """
    tokens, experts = map_TE.shape
    if bound is None or bound >= tokens * experts or tokens == 0:
        return map_TE
    chosen_TE = scores_TE.masked_fill(~map_TE, -torch.inf)
    best_TE = torch.zeros_like(map_TE).scatter(-1, chosen_TE.argmax(dim=-1, keepdim=True), True) & map_TE
    # NaN would sort first and crowd the others out; its token keeps its best expert all the same.
    extra = chosen_TE.masked_fill(best_TE, -torch.inf).nan_to_num(nan=-torch.inf, neginf=-torch.inf).flatten()
    # Tokens without an expert leave their room to others; how many there are is known on the device alone.
    order = extra.topk(bound).indices
    within = torch.arange(bound, device=order.device) < bound - best_TE.sum()
    kept = torch.zeros_like(map_TE.flatten()).scatter(0, order, within)
    return best_TE | (kept.view_as(map_TE) & map_TE)


def finish_weights(scores_TE: Tensor, map_TE: Tensor, *, normalize: bool) -> Tensor:
    """The chosen experts' scores, 0 elsewhere; divided by their sum if ``normalize``.

    Returns:
        [T, E] in the dtype of ``scores_TE``.
    """
    # where, not a product: 0 * NaN would carry a NaN score to experts that were not chosen.
    weights_TE = torch.where(map_TE, scores_TE, scores_TE.new_zeros(()))
    if normalize:
        tiny = torch.finfo(scores_TE.dtype).tiny
        weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True).clamp_min(tiny)
    return weights_TE
