"""What controllers of a router keep in a checkpoint: settings that they moved, which an export takes as they stand."""

from typing import Any

from megatron_dynmoe.checkpoint.reader import DistCheckpoint
from megatron_dynmoe.routers.router_config import RouterConfig, exported_fields

from .errors import ExportError
from .slots import RECORDS


def router_config(fields: dict[str, Any], **training: Any) -> RouterConfig:
    """What the router of an exported configuration was set by at the start, with settings that act while training."""
    names = {name: field.name for name, field in _exported(fields).items()}
    return RouterConfig(**{own: fields[name] for name, own in names.items() if name in fields}, **training)


def training_state(fields: dict[str, Any]) -> set[str]:
    """Names under which routers keep what is for training alone, or has become a moved setting."""
    config = router_config(fields)
    found = set(RECORDS)
    for controller in _controllers(config):
        found |= {*controller.sets, *controller(config, fields["num_experts"], fields["hidden_size"]).state()}
    return found


def moved_fields(checkpoint: DistCheckpoint, fields: dict[str, Any]) -> dict[str, Any]:
    """`moved_settings` of the configuration: by exported name a number for each layer; nothing if none was moved.

    Raises:
        ExportError: a setting is moved in some layers only, is no single finite number, or has no place in an export.
    """
    if not any(fields["moe_layers"]):
        return {}
    exported = {field.name: name for name, field in _exported(fields).items()}
    moved = {}
    for name in dict.fromkeys(name for kind in _controllers(router_config(fields)) for name in kind.sets):
        values = [
            _value(checkpoint, layer, name) if is_moe else None for layer, is_moe in enumerate(fields["moe_layers"])
        ]
        there = [value is not None for value, is_moe in zip(values, fields["moe_layers"], strict=True) if is_moe]
        if any(there) != all(there):
            raise ExportError(f"{checkpoint.path} has router.{name}, which training moved, in some layers only.")
        # A setting of losses or bounds acts while training alone.
        if any(there) and name in exported:
            moved[exported[name]] = values
    return {"moved_settings": moved} if moved else {}


def _value(checkpoint: DistCheckpoint, layer: int, name: str) -> float | None:
    """The setting in one layer; `None` where its controller was off."""
    own, stacked = f"decoder.layers.{layer}.mlp.router.{name}", f"decoder.layers.mlp.router.{name}"
    if own not in checkpoint.shapes and stacked not in checkpoint.shapes:
        return None
    value = checkpoint.read(own) if own in checkpoint.shapes else checkpoint.read(stacked, (layer,))
    if value.numel() != 1 or not value.isfinite():
        raise ExportError(f"router.{name} of layer {layer} in {checkpoint.path} is {value.tolist()}, no finite number.")
    return value.item()


def _controllers(config: RouterConfig) -> list[Any]:
    return [method.controller for method in config.methods if method.controller is not None]


def _exported(fields: dict[str, Any]) -> dict[str, Any]:
    from megatron_dynmoe.routers import GATES, RULES

    gate, rule = fields.get("router_gate", RouterConfig.gate), fields.get("router_rule", RouterConfig.rule)
    return exported_fields(GATES[gate], RULES[rule], own=True)
