"""Weights of one expert slot, and what the optimizer keeps beside them, under every expert backend and optimizer.

An optimizer holds float32 copies of weights (mixed precision), or of this rank's share of them (distributed optimizer),
and moments for each.  What changes a weight from outside has to change all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn import Parameter

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.mcore.experts import TorchGroupedMLP


@dataclass(frozen=True)
class Slice:
    """A parameter, or one index of its first axis."""

    parameter: Parameter
    index: int | None = None

    @property
    def data(self) -> Tensor:
        """The values, a view."""
        return self.parameter.data if self.index is None else self.parameter.data[self.index]

    @property
    def extent(self) -> tuple[int, int]:
        """[begin, end) in the flattened parameter."""
        size = self.data.numel()
        begin = (self.index or 0) * size
        return begin, begin + size


def expert_weights(experts: Any, slot: int) -> tuple[Slice, Slice]:
    """The first and the second weight of local expert ``slot``: [2F or F, D] and [D, F], this rank's share."""
    if isinstance(experts, TorchGroupedMLP):
        return Slice(experts.weight1, slot), Slice(experts.weight2, slot)
    if isinstance(experts, SequentialMLP):
        expert = experts.local_experts[slot]
        return Slice(expert.linear_fc1.weight), Slice(expert.linear_fc2.weight)
    weights = [getattr(linear, f"weight{slot}") for linear in (experts.linear_fc1, experts.linear_fc2)]
    return Slice(weights[0]), Slice(weights[1])


def check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers whose copies of the weights cannot be reached.

    Raises:
        ConfigError: naming the optimizer.
    """
    for leaf in _leaves(optimizer):
        known = isinstance(leaf, FP32Optimizer | Float16OptimizerWithFloat16Params | DistributedOptimizer)
        aware = getattr(leaf.config, "use_precision_aware_optimizer", False)
        offloaded = getattr(leaf.config, "optimizer_cpu_offload", False)
        if not known or aware or offloaded:
            kind = "--use-precision-aware-optimizer" if aware else "--optimizer-cpu-offload" if offloaded else None
            what = f"changes weights and optimizer state, which {kind or type(leaf).__name__} keeps out of reach"
            raise ConfigError(
                f"--moe-adaptive-experts {what}; accepted: Adam or SGD, plain or with --use-distributed-optimizer."
            )


@torch.no_grad()
def write(optimizer: Any, where: Slice, value: Tensor, *, reset: bool) -> None:
    """Set weights, in the model and in the optimizer's copy; with ``reset`` its moments start again from zero.

    Args:
        optimizer: Megatron's, or ``None``: the model alone.
        where: what to set.
        value: of the shape of ``where.data``, the same on every rank that holds a copy.
    """
    where.data.copy_(value)
    begin, end = where.extent
    for main, moments, first in _main_copies(optimizer, where.parameter):
        low, high = max(begin, first), min(end, first + main.numel())
        if low >= high:
            continue
        main.data.view(-1)[low - first : high - first] = value.reshape(-1)[low - begin : high - begin].to(main.dtype)
        if reset:
            for moment in moments:
                moment.view(-1)[low - first : high - first] = 0


def _leaves(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", None)
    leaves = [optimizer] if chained is None else [leaf for part in chained for leaf in _leaves(part)]
    return [leaf for leaf in leaves if not leaf.is_stub_optimizer]


def _main_copies(optimizer: Any, parameter: Parameter) -> Iterator[tuple[Tensor, list[Tensor], int]]:
    """The tensor that the optimizer updates, its moments, and where it begins in the flattened parameter."""
    for leaf in _leaves(optimizer) if optimizer is not None else []:
        if isinstance(leaf, DistributedOptimizer):
            if parameter not in leaf.model_param_group_index_map:
                continue
            group, order = leaf.model_param_group_index_map[parameter]
            main = leaf.optimizer.param_groups[group]["params"][order]
            first = leaf._get_model_param_range_map(parameter)["param"].start
        else:
            main, first = getattr(parameter, "main_param", parameter), 0
            if not any(main is held for group in leaf.optimizer.param_groups for held in group["params"]):
                continue
        state = leaf.optimizer.state.get(main, {})
        moments = [v for v in state.values() if isinstance(v, Tensor) and v.numel() == main.numel() and v.dim() > 0]
        yield main, moments, first
