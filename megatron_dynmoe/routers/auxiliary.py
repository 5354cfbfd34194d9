"""The auxiliary losses of a router: those that every router may have, and those that gate and rule bring along."""

from __future__ import annotations

from torch import Tensor

from megatron_dynmoe.losses import heterogeneous_balance_loss, load_balance_loss, z_loss
from megatron_dynmoe.routers.registry import Loss, Routed
from megatron_dynmoe.routers.router_config import RouterConfig


def balance(routed: Routed, scores_TC: Tensor, tokens: Tensor) -> Tensor:
    """The load-balance loss over ``scores_TC`` and ``tokens``; MoE++'s where there are zero-computation experts."""
    rows_C, config = routed.totals.rows_C, routed.config
    if zero_computation := config.zero_computation_experts:
        return heterogeneous_balance_loss(
            scores_TC, rows_C=rows_C, num_tokens=tokens, zero_computation=zero_computation, tau=config.tau
        )
    experts = None if routed.active_E is None else routed.active_E.sum()
    return load_balance_loss(scores_TC, rows_E=rows_C, num_tokens=tokens, experts=experts)


def _balance(routed: Routed) -> Tensor:
    return balance(routed, routed.routing.scores_TC, routed.totals.tokens)


def _z_loss(routed: Routed) -> Tensor:
    return z_loss(routed.routing.logits_TC, num_tokens=routed.totals.tokens)


COMMON = (
    Loss("load_balancing_loss", "load_balance_coeff", _balance),
    Loss("z_loss", "z_loss_coeff", _z_loss),
)


def losses_of(config: RouterConfig) -> list[Loss]:
    """The losses that ``config`` asks for; a method's own stands in the place of a common one of its name.

    One whose coefficient a controller moves is asked for also where that is 0, as it need not stay there.
    """
    by_name = {loss.name: loss for loss in COMMON}
    for method in config.methods:
        by_name |= {loss.name: loss for loss in method.losses}
    moving = config.moving
    return [loss for loss in by_name.values() if getattr(config, loss.coefficient) or loss.coefficient in moving]


def router_losses(routed: Routed) -> dict[str, tuple[float, Tensor]]:
    """By the name they are logged under: (coefficient, this rank's share)."""
    config = routed.config
    return {loss.name: (getattr(config, loss.coefficient), loss.function(routed)) for loss in losses_of(config)}
