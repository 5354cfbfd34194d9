"""A router end to end: gate, rule, bounds, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import GATES, NONE, RULES
from megatron_dynmoe.routers.routing import Routing

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


def route(
    x_TD: Tensor,
    weight_CD: Tensor,
    config: RouterConfig,
    *,
    parameters: Mapping[str, Tensor] = NONE,
    active_E: Tensor | None = None,
    previous_TC: Tensor | None = None,
    training: bool = True,
) -> Routing:
    """Route each token: which experts, with what weight.

    Args:
        x_TD: hidden states, any float dtype.
        weight_CD: the router's weight; its shape is the gate's affair.
        config: gate, rule, bounds and normalisation.
        parameters: what gate and rule learn beside the weight, by name; ``gate_map`` [C, C] of a gating residual.
        active_E: bool, the experts that there are to choose from; unset: all.
        previous_TC: float32, the previous MoE layer's logits.
        training: hold the memory guard's bound and capacities, and let a token visit nobody where the rule says so. In
            evaluation none of it is done: there a token's experts must not depend on the other tokens of the batch,
            and a rule's empty choice is replaced by the active expert with the highest score.

    Returns:
        Routing, float32. Gradients reach ``x_TD``, the parameters and ``previous_TC`` through the weights and the
        logits; the choice itself has none.
    """
    gate, rule = GATES[config.gate], RULES[config.rule]
    logits_TC = gate.logits(x_TD, weight_CD, config, parameters)
    if previous_TC is not None:
        logits_TC = logits_TC + linear32(previous_TC, parameters["gate_map"])
    normed_TC = logits_TC if config.logits_norm_std is None else norm_logits(logits_TC, config.logits_norm_std)
    scores_TC = gate.scores(normed_TC)
    experts = scores_TC.shape[-1] - config.zero_computation_experts
    with torch.no_grad():
        open_TC = scores_TC if active_E is None else scores_TC.masked_fill(~active_E, -torch.inf)
        chosen_TC = rule(open_TC, config, parameters)
        if rule.may_be_empty and not training:
            chosen_TC = chosen_TC | best_of_none(chosen_TC, open_TC)
        map_TC, cut, dropped = bound_map(chosen_TC, scores_TC, config, training=training)
    if config.drop_zero_weight:
        weights_TC = weights_without_zero(normed_TC, map_TC, config.zero_experts)
    elif rule.weights is None:
        weights_TC = finish_weights(scores_TC, map_TC, normalize=config.normalize_weights)
    else:
        weights_TC = rule.weights(scores_TC, map_TC, config, parameters)
    return Routing(
        weights_TC=weights_TC,
        map_TC=map_TC,
        scores_TC=scores_TC,
        logits_TC=logits_TC,
        experts=experts,
        cut=cut,
        dropped=dropped,
    )


def norm_logits(logits_TC: Tensor, std: float) -> Tensor:
    """Each token's logits divided by (their unbiased standard deviation / ``std``); public code of MoE++."""
    tiny = torch.finfo(logits_TC.dtype).tiny
    return logits_TC / (logits_TC.std(dim=-1, keepdim=True) / std).clamp_min(tiny)


def bound_map(
    chosen_TC: Tensor, scores_TC: Tensor, config: RouterConfig, *, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the bounds leave of a choice: the cap on a token's experts, capacities, and the guard on FFN rows.

    Returns:
        the map; assignments cut by the cap and the guard, and dropped by a capacity, int64 scalars on the device.
    """
    map_TC = cap_experts(chosen_TC, scores_TC, config.max_experts_per_token)
    cut, dropped = chosen_TC.sum() - map_TC.sum(), map_TC.new_zeros((), dtype=torch.int64)
    if not training:
        return map_TC, cut, dropped
    tokens, zero_computation = len(map_TC), config.zero_computation_experts
    experts = map_TC.shape[1] - zero_computation
    if config.capacity_gamma is not None:
        most = capacities(tokens, experts, config)
        parts = zip(
            map_TC.split([experts, zero_computation], 1),
            scores_TC.split([experts, zero_computation], 1),
            most,
            strict=True,
        )
        fitting_TC = torch.cat([cap_columns(*part) for part in parts], dim=1)
        map_TC, dropped = fitting_TC, map_TC.sum() - fitting_TC.sum()
    bound = row_bound(tokens, config)
    if bound is not None:
        guarded_TE = cap_rows(map_TC[:, :experts], scores_TC[:, :experts], bound)
        cut = cut + map_TC[:, :experts].sum() - guarded_TE.sum()
        map_TC = torch.cat([guarded_TE, map_TC[:, experts:]], dim=1)
    return map_TC, cut, dropped


def capacities(tokens: int, experts: int, config: RouterConfig) -> tuple[int, int]:
    """Tokens that an FFN expert takes, gamma tau T / (tau N_FFN + N_ZC), and a zero-computation one, gamma T / (...).

    As printed in Jin et al. 2024, arXiv 2410.07348, eq. 8, there is no factor k: to leave room for k assignments a
    token, gamma has to have it.
    """
    zero_computation, tau, gamma = config.zero_computation_experts, config.tau, config.capacity_gamma or 0.0
    unit = gamma * tokens / (tau * experts + zero_computation)
    return max(int(tau * unit), 1), max(int(unit), 1)


def cap_columns(map_TC: Tensor, scores_TC: Tensor, most: int) -> Tensor:
    """Keep at most ``most`` tokens of each column, those with the highest scores; ties keep the earlier token."""
    chosen_TC = scores_TC.masked_fill(~map_TC, -torch.inf)
    order_TC = chosen_TC.sort(dim=0, descending=True, stable=True).indices
    place_TC = torch.empty_like(order_TC).scatter_(
        0, order_TC, torch.arange(len(map_TC), device=order_TC.device).unsqueeze(1).expand_as(order_TC)
    )
    return map_TC & (place_TC < most)


def weights_without_zero(logits_TC: Tensor, map_TC: Tensor, zero_experts: int) -> Tensor:
    """Softmax over a token's chosen experts other than zero experts, whose weight is 0.

    The public code divides probabilities, which is NaN where the partner's underflowed; the same quotient of
    exponentials, taken of the logits, never is.  A token that chose zero experts alone has no weight at all.
    """
    kept_TC = map_TC.clone()
    kept_TC[:, map_TC.shape[1] - zero_experts :] = False
    some_T1 = kept_TC.any(dim=-1, keepdim=True)
    masked_TC = logits_TC.masked_fill(~kept_TC, -torch.inf).masked_fill(~some_T1, 0.0)
    return torch.where(kept_TC, masked_TC.softmax(dim=-1), logits_TC.new_zeros(()))


def best_of_none(map_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """bool [T, E]: the expert with the highest score for each token whose row of the map is empty."""
    best_T1 = scores_TE.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(map_TE).scatter(-1, best_T1, ~map_TE.any(dim=-1, keepdim=True))


def row_bound(num_tokens: int, config: RouterConfig) -> int | None:
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
