"""What a controller may do to a layer's experts: their weights, and what the optimizer keeps beside them.

An optimizer holds float32 copies of weights (mixed precision), or of this rank's share of them (distributed optimizer),
and moments for each.  What changes a weight from outside has to change all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn import Parameter

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.mcore.experts import TorchGroupedMLP

# Options, of OptimizerConfig and DistributedDataParallelConfig, with which state lies where `write` does not look.
_OUT_OF_REACH = ("use_precision_aware_optimizer", "optimizer_cpu_offload", "use_megatron_fsdp")


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


class LayerExperts:
    """:class:`megatron_dynmoe.routers.controller.Experts` over a layer, under every expert backend and optimizer.

    Args:
        layer: a dynamic MoE layer.
        optimizer: Megatron's, or ``None``.
        seed: of new weights.
        gather: makes the weights of the model whole where they are stale after a step.
    """

    def __init__(self, layer: Any, optimizer: Any, *, seed: int, gather: Callable[[], None]) -> None:
        self.layer, self.optimizer, self.seed, self._gather = layer, optimizer, seed, gather

    def parameter(self, name: str) -> Tensor:
        """What the router learns under ``name``, whole and as it stands; read only."""
        self._gather()
        return getattr(self.layer.router, name).detach()

    def write(self, name: str, slot: int, value: Tensor) -> None:
        """Set a row of what the router learns under ``name``; what the optimizer keeps for it starts again."""
        self._gather()
        write(self.optimizer, Slice(getattr(self.layer.router, name), slot), value, reset=True)

    def _begin(self) -> None:
        self._gather()
        for name in ("fp8_param", "fp4_param"):
            if getattr(self.layer.config, name, False):
                flag = f"--{name.replace('_', '-')}-gather"
                raise ConfigError(
                    f"{flag} is True; accepted: off, as a controller writes weights, not their quantised form."
                )

    def fresh(self, slot: int, number: int) -> None:
        """New weights, drawn whole on the CPU so that they do not depend on the layout."""
        self._begin()
        layer = self.layer
        local = slot - layer.ep_group.rank() * layer.num_local_experts
        if not 0 <= local < layer.num_local_experts:
            return
        config, rank, place = layer.config, layer.experts.tp_group.rank(), layer.router.layer_index + 1
        halves = 2 if config.gated_linear_unit else 1
        width, inner = config.hidden_size, config.moe_ffn_hidden_size
        with torch.random.fork_rng(devices=[]):  # torch.manual_seed would seed CUDA too, and on this rank alone
            torch.default_generator.manual_seed(((self.seed * 1_000_003 + number) * 1009 + place) * 1009 + slot)
            fc1, fc2 = torch.empty(halves * inner, width, device="cpu"), torch.empty(width, inner, device="cpu")
            config.init_method(fc1)
            config.output_layer_init_method(fc2)
        weights = expert_weights(layer.experts, local)
        share = slice(rank * weights[1].data.shape[1], (rank + 1) * weights[1].data.shape[1])
        fc1 = fc1.view(halves, inner, width)[:, share].reshape(weights[0].data.shape)
        for where, value in zip(weights, (fc1, fc2[:, share]), strict=True):
            write(self.optimizer, where, value.to(where.data.device), reset=True)

    def copy(self, slot: int, source: int) -> None:
        """The weights of expert ``source``, which may be on another rank."""
        self._begin()
        group, local = self.layer.ep_group, self.layer.num_local_experts
        mine = group.rank()
        for part in range(2):
            like = expert_weights(self.layer.experts, source % local)[part].data
            weight = like.clone() if mine == source // local else torch.empty_like(like)
            if slot // local != source // local:
                dist.broadcast(weight, src=dist.get_global_rank(group, source // local), group=group)
            if mine == slot // local:
                write(self.optimizer, expert_weights(self.layer.experts, slot % local)[part], weight, reset=True)


def expert_weights(experts: Any, slot: int) -> tuple[Slice, Slice]:
    """The first and the second weight of local expert ``slot``: [2F or F, D] and [D, F], this rank's share."""
    if isinstance(experts, TorchGroupedMLP):
        return Slice(experts.weight1, slot), Slice(experts.weight2, slot)
    if isinstance(experts, SequentialMLP):
        expert = experts.local_experts[slot]
        return Slice(expert.linear_fc1.weight), Slice(expert.linear_fc2.weight)
    weights = [getattr(linear, f"weight{slot}") for linear in (experts.linear_fc1, experts.linear_fc2)]
    return Slice(weights[0]), Slice(weights[1])


def check_optimizer(optimizer: Any, flag: str = "--moe-adaptive-experts") -> None:
    """Refuse optimizers whose copies of the weights cannot be reached, or that would save one for another.

    Args:
        optimizer: Megatron's.
        flag: that asks for a controller which writes.

    Raises:
        ConfigError: naming the optimizer.
    """
    for leaf in _leaves(optimizer):
        known = isinstance(leaf, FP32Optimizer | Float16OptimizerWithFloat16Params | DistributedOptimizer)
        options = {**vars(leaf.config), **vars(getattr(leaf, "ddp_config", leaf.config))}
        hiding = [name for name in _OUT_OF_REACH if options.get(name)]
        if not known or hiding:
            kind = "--" + hiding[0].replace("_", "-") if hiding else type(leaf).__name__
            what = f"changes weights and optimizer state, which {kind} keeps out of reach"
            raise ConfigError(f"{flag} {what}; accepted: Adam or SGD, plain or with --use-distributed-optimizer.")
        if isinstance(leaf, DistributedOptimizer) and not all(_by_number(leaf, p) is main for p, main in _shares(leaf)):
            raise ConfigError(
                "--use-distributed-optimizer was built without megatron_dynmoe.host.enable(), and would save float32 "
                "and 16-bit parameters for one another; call host.enable() first thing in the program."
            )


@torch.no_grad()
def write(optimizer: Any, where: Slice, value: Tensor, *, reset: bool) -> None:
    """Set weights, in the model and in the optimizer's copy; with ``reset`` its moments start again from zero.

    Args:
        optimizer: Megatron's, or ``None``: the model alone.
        where: what to set.
        value: of the shape of ``where.data``, the same on every rank that holds a copy.

    Raises:
        RuntimeError: what the optimizer keeps for the parameter is not of its length; nothing is written then.
    """
    copies = list(main_copies(optimizer, where.parameter))
    where.data.copy_(value)
    begin, end = where.extent
    for main, moments, first in copies:
        low, high = max(begin, first), min(end, first + main.numel())
        if low >= high:
            continue
        main.data.view(-1)[low - first : high - first] = value.reshape(-1)[low - begin : high - begin].to(main.dtype)
        if reset:
            for moment in moments:
                moment.view(-1)[low - first : high - first] = 0


def main_copies(optimizer: Any, parameter: Parameter) -> Iterator[tuple[Tensor, list[Tensor], int]]:
    """The tensor that the optimizer updates, its moments, and where it begins in the flattened parameter.

    Nothing for a parameter of which this rank's share is empty.

    Raises:
        RuntimeError: one of them is not of the length of the parameter, or of this rank's share of it.
    """
    for leaf in _leaves(optimizer) if optimizer is not None else []:
        if isinstance(leaf, DistributedOptimizer):
            if parameter not in leaf.model_param_gbuf_map:
                continue
            main = next(main for model, main in _shares(leaf) if model is parameter)
            share = leaf._get_model_param_range_map(parameter)["param"]
            first, length = share.start, share.size
        else:
            main, first, length = getattr(parameter, "main_param", parameter), 0, parameter.numel()
            if not any(main is held for group in leaf.optimizer.param_groups for held in group["params"]):
                continue
        state = {name: v for name, v in leaf.optimizer.state.get(main, {}).items() if isinstance(v, Tensor) and v.dim()}
        for name, kept in {"copy": main, **state}.items():
            if kept.numel() != length:
                raise RuntimeError(
                    f"the optimizer's {name} of {_name(leaf, parameter)} has {kept.numel()} numbers, but {length} of "
                    f"the parameter's {parameter.numel()} are this rank's; the added expert was not written."
                )
        yield main, list(state.values()), first


def _leaves(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", None)
    leaves = [optimizer] if chained is None else [leaf for part in chained for leaf in _leaves(part)]
    return [leaf for leaf in leaves if not leaf.is_stub_optimizer]


def _shares(leaf: DistributedOptimizer) -> Iterator[tuple[Parameter, Tensor]]:
    """Each parameter that this rank has a share of, and the tensor that the optimizer updates for it.

    From the lists that megatron steps with.  Its numbers (``model_param_group_index_map``) are right only once
    ``host/mixed_groups.py`` has mended them.
    """
    models = [*leaf.model_fp32_groups, *leaf.model_float16_groups]
    mains = [*leaf.shard_fp32_groups, *leaf.shard_fp32_from_float16_groups]
    for group, main_group in zip(models, mains, strict=True):
        yield from zip(group, main_group, strict=True)


def _by_number(leaf: DistributedOptimizer, parameter: Parameter) -> Tensor:
    """What megatron saves and loads as the parameter's main copy."""
    group, order = leaf.model_param_group_index_map[parameter]
    return leaf.optimizer.param_groups[group]["params"][order]


def _name(leaf: Any, parameter: Parameter) -> str:
    named = (pair for chunk in getattr(leaf, "model_chunks", []) for pair in chunk.named_parameters())
    return next((n for n, p in named if p is parameter), f"a parameter of shape {tuple(parameter.shape)}")
