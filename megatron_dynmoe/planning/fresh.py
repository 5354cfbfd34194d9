"""How many experts a token visits when routers are new, which is when memory is at its fullest.

A new router is flat: its logits are so small that all experts are about as probable, and a rule that collects
probability takes many of them.  Training makes them few.  A norm stands before the router, so its input has length
sqrt(D).  That is all that a router sees of the model: new ones are drawn here, and route random inputs of that length,
whatever gate and rule they have.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from threading import Lock

import torch

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.planning.shapes import Model
from megatron_dynmoe.routers import route
from megatron_dynmoe.routers.fresh import draw

ROUTERS, TOKENS = 8, 512  # the mean of k is then within a few hundredths; routers differ more than tokens
SEED = 0
DRAWING = Lock()  # several models may be planned at once, and torch's generator is one for all


def fresh_k(model: Model) -> float:
    """Mean FFN experts a token visits at the start of training."""
    active = model.experts
    for kind in model.routing.controllers:
        controller = kind(model.routing, model.columns, model.width)
        mask_E = controller.active({name: torch.as_tensor(value) for name, value in controller.state().items()})
        active = active if mask_E is None else int(mask_E.sum())
    return _bounded(model, active=active)


def fullest_k(model: Model) -> float:
    """The most over training that can be said beforehand: with an adaptive number of experts all slots may fill."""
    return _bounded(model, active=model.experts)


def _bounded(model: Model, *, active: int) -> float:
    routing, tokens = model.routing, model.sequence * model.micro_batch
    unbounded = replace(routing, max_rows=None, max_rows_per_token=None, capacity_gamma=None)
    mean = _mean_k(unbounded, active + routing.zero_computation_experts, model.width, model.init_std)
    if routing.max_rows_per_token is not None:
        mean = min(mean, max(routing.max_rows_per_token, 1.0))
    if routing.max_rows is not None:
        mean = min(mean, max(routing.max_rows / tokens, 1.0))
    return mean


@cache
def _mean_k(routing: DynMoEConfig, columns: int, width: int, std: float) -> float:
    rows = 0
    with DRAWING, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(SEED)
        for _ in range(ROUTERS):
            weight, parameters = draw(routing, columns, width, std)
            x_TD = torch.nn.functional.normalize(torch.randn(TOKENS, width), dim=-1) * math.sqrt(width)
            rows += int(route(x_TD, weight, routing, parameters=parameters).map_TE.sum())
    return rows / (ROUTERS * TOKENS)
