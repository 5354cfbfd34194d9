"""What a router keeps for its backward pass, counted by running it: of any gate, rule and losses."""

from __future__ import annotations

from functools import cache

import torch

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.losses import Totals
from megatron_dynmoe.planning.fresh import DRAWING
from megatron_dynmoe.routers import route
from megatron_dynmoe.routers.auxiliary import router_losses
from megatron_dynmoe.routers.fresh import draw
from megatron_dynmoe.routers.registry import Routed

FEW, MANY = 32, 96  # tokens; what does not grow with them is not counted


@cache
def router_bytes(routing: DynMoEConfig, columns: int, width: int, itemsize: int) -> int:
    """Bytes a token that autograd keeps of the router and its losses, its input in the model's dtype included.

    It depends on the input alone through shapes, so an input of zeros will do.
    """
    few, many = (_kept(routing, columns, width, itemsize, tokens) for tokens in (FEW, MANY))
    return (many - few) // (MANY - FEW)


def _kept(routing: DynMoEConfig, columns: int, width: int, itemsize: int, tokens: int) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with DRAWING, torch.random.fork_rng(devices=[]):
        weight, parameters = draw(routing, columns, width, 0.02)
    for value in (weight, *parameters.values()):
        value.requires_grad_()
    x_TD = torch.zeros(tokens, width, dtype=torch.float32 if itemsize == 4 else torch.bfloat16, requires_grad=True)
    previous_TC = torch.zeros(tokens, columns, requires_grad=True) if routing.gating_residual else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = route(x_TD, weight, routing, parameters=parameters, previous_TC=previous_TC)
        totals = Totals(found.map_TC.sum(dim=0).float(), torch.tensor(tokens), torch.tensor(tokens), ranks=1)
        router_losses(Routed(found, routing, totals, weight, parameters))
    own = {value.untyped_storage()._cdata for value in (weight, *parameters.values())}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)
