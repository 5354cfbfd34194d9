"""What controllers of a router keep in a checkpoint: settings that they moved, which an export takes as they stand."""

from argparse import Namespace
from typing import Any

from megatron_dynmoe.checkpoint.reader import DistCheckpoint
from megatron_dynmoe.routers import GATES, RULES
from megatron_dynmoe.routers.registry import fields_of
from megatron_dynmoe.routers.router_config import RouterConfig, exported_fields
from megatron_dynmoe.routers.settings import dest_of_field

from .errors import ExportError


def router_config(fields: dict[str, Any], **training: Any) -> RouterConfig:
    """What the router of an exported configuration was set by at the start, with settings that act while training."""
    return RouterConfig(**_values(fields) | training)


def training_state(args: Namespace, fields: dict[str, Any]) -> set[str]:
    """Names under which the routers of a training kept what moves between steps; see :meth:`Controller.state`."""
    config = _trained_config(args, fields)
    columns = fields["num_experts"] + config.zero_computation_experts
    return {name for kind in config.controllers for name in kind(config, columns, fields["hidden_size"]).state()}


def moved_fields(checkpoint: DistCheckpoint, fields: dict[str, Any]) -> dict[str, Any]:
    """`moved_settings` of the configuration: by exported name a number for each layer; nothing if none was moved.

    Raises:
        ExportError: a setting is not there in each layer, or is no finite number.
    """
    exported = {field.name: name for name, field in _exported(fields).items()}
    # A setting of losses or bounds acts while training alone.
    names = [name for name in exported if name in _trained_config(checkpoint.args, fields).moving]
    if not names or not any(fields["moe_layers"]):
        return {}
    moved = {
        exported[name]: [
            _value(checkpoint, layer, name) if is_moe else None for layer, is_moe in enumerate(fields["moe_layers"])
        ]
        for name in names
    }
    return {"moved_settings": moved}


def _value(checkpoint: DistCheckpoint, layer: int, name: str) -> float:
    own, stacked = f"decoder.layers.{layer}.mlp.router.{name}", f"decoder.layers.mlp.router.{name}"
    if own not in checkpoint.shapes and stacked not in checkpoint.shapes:
        raise ExportError(f"{checkpoint.path} has no {own}, the setting as its controller left it.")
    value = checkpoint.read(own) if own in checkpoint.shapes else checkpoint.read(stacked, (layer,))
    if value.numel() != 1 or not value.isfinite():
        raise ExportError(f"{own} in {checkpoint.path} is {value.tolist()}; it must be a finite number.")
    return value.item()


def _trained_config(args: Namespace, fields: dict[str, Any]) -> RouterConfig:
    """The same as :func:`router_config`, with what gate and rule read while training alone."""
    values = _values(fields)
    methods = (GATES[values["gate"]], RULES[values["rule"]]) if hasattr(args, "moe_rule") else ()
    for field in (field for method in methods for field in fields_of(method)):
        values.setdefault(field.name, getattr(args, dest_of_field(field), field.default))
    return RouterConfig(**values)


def _values(fields: dict[str, Any]) -> dict[str, Any]:
    values = {field.name: fields[name] for name, field in _exported(fields).items() if name in fields}
    return {"gate": RouterConfig.gate, "rule": RouterConfig.rule} | values


def _exported(fields: dict[str, Any]) -> dict[str, Any]:
    gate, rule = fields.get("router_gate", RouterConfig.gate), fields.get("router_rule", RouterConfig.rule)
    return exported_fields(GATES[gate], RULES[rule], own=True)
