"""What a training keeps and an exported model has not: fresh values for it, of the shapes that megatron looks for."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.routers.router_config import exported_fields

from .moved import router_config
from .rows import Row
from .slots import MASK


def fresh(row: Row, slot: int | None, shape: tuple[int, ...], fields: dict[str, Any]) -> Tensor:
    """Values, float32, for what no exported tensor of `row` covers: padding is zero, an inactive slot's weights drawn.

    A slot that training activates later keeps what it holds ("keep" of `added_expert_init`), and an expert of zeros
    would never learn: both its weights' gradients are products with the other. The distributions are megatron's.

    Args:
        row: of the table, or of one expert.
        slot: of that expert.
        shape: of megatron's tensor.
        fields: of the configuration.
    """
    name, std = row.keys[0], fields["initializer_range"]
    by_slot = name == "mlp.router.weight" and any(isinstance(part.index, list) for part in row.parts)
    if slot is None and not by_slot:
        return torch.zeros(shape)
    second = name.endswith("linear_fc2.weight")
    generator = torch.Generator().manual_seed(((row.layer or 0) * 100_003 + (slot or 0)) * 2 + second)
    drawn = torch.randn(shape, generator=generator)
    if by_slot:
        return torch.nn.functional.normalize(drawn, dim=-1)  # directions alone count in a cosine
    # scaled_init_method_normal for what is added to the residual stream
    return drawn.mul_(std / math.sqrt(2 * fields["num_hidden_layers"]) if second else std)


def records(fields: dict[str, Any], max_added_experts: int) -> dict[tuple[int, str], Tensor]:
    """By layer and name, what routers keep: moved settings, active slots, and what is for training alone, at its start.

    Args:
        fields: of the configuration.
        max_added_experts: of the training to come, where the number of experts adapts.
    """
    config = router_config(fields, **({"max_added_experts": max_added_experts} if fields["expert_slots"] else {}))
    columns, width = fields["num_experts"] + config.zero_computation_experts, fields["hidden_size"]
    settings = exported_fields(*config.methods, own=True)
    moved = {settings[name].name: row for name, row in (fields["moved_settings"] or {}).items()}
    state: dict[str, Any] = {}
    for kind in config.controllers:
        state |= kind(config, columns, width).state()
    found: dict[tuple[int, str], Tensor] = {}
    for layer, is_moe in enumerate(fields["moe_layers"]):
        here = state | {name: row[layer] for name, row in moved.items()} if is_moe else {}
        if is_moe and fields["expert_slots"]:
            here[MASK] = torch.zeros(fields["num_experts"], dtype=torch.bool)
            here[MASK][fields["expert_slots"][layer]] = True
        found |= {(layer, f"mlp.router.{name}"): _tensor(value) for name, value in here.items()}
    return found


def _tensor(value: Any) -> Tensor:
    """As a router keeps it: numbers as float32, lists of whole numbers as int64."""
    if isinstance(value, Tensor):
        return value.clone()
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, list) else torch.float32)


def empty_states(fields: dict[str, Any], keys: Callable[[int, str, int | None], Iterator[str]]) -> dict[str, None]:
    """The states that linear layers keep beside their weights (FP8 scales), empty: megatron insists on finding them.

    Args:
        keys: the sharded keys of an object's layer, name and number of experts.
    """
    names = []
    for layer, is_moe in enumerate(fields["moe_layers"]):
        linears: list[tuple[str, int | None]] = [
            ("self_attention.linear_qkv", None),
            ("self_attention.linear_proj", None),
        ]
        mlps: list[tuple[str, int | None]] = [("mlp", None)]
        if is_moe:
            mlps = [("mlp.experts.experts", fields["num_experts"])]
            mlps += [("mlp.shared_experts", None)] if fields["shared_expert_intermediate_size"] else []
        linears += [(f"{mlp}.linear_fc{number}", experts) for mlp, experts in mlps for number in (1, 2)]
        names += [key for name, experts in linears for key in keys(layer, f"{name}._extra_state", experts)]
    return dict.fromkeys(names)
