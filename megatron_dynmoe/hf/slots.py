"""Which slots of an adaptive number of experts are active in a checkpoint."""

from typing import Any

from megatron_dynmoe.checkpoint.reader import DistCheckpoint

from .errors import ExportError

MASK = "experts_mask"
# What DynMoE's adaptation remembers for training alone.
RECORDS = (MASK, "recorded_rows_E", "recorded_unrouted_B", "recorded_sums_BD", "schedule")


def slot_fields(checkpoint: DistCheckpoint, fields: dict[str, Any]) -> dict[str, Any]:
    """`expert_slots` and `experts_by_layer` of the configuration; nothing if all experts of the checkpoint are active.

    Raises:
        ExportError: a layer has no active expert, or a mask that does not fit.
    """
    if not any(key.endswith(f".router.{MASK}") for key in checkpoint.shapes):
        return {}
    slots: list[list[int]] = []
    for layer, is_moe in enumerate(fields["moe_layers"]):
        active = _mask(checkpoint, layer) if is_moe else []
        if is_moe and (len(active) != fields["num_experts"] or not any(active)):
            raise ExportError(
                f"layer {layer} of {checkpoint.path} has the mask {active}; at least one of {fields['num_experts']} "
                "slots must be active."
            )
        slots.append([slot for slot, is_active in enumerate(active) if is_active])
    return {"expert_slots": slots, "experts_by_layer": [len(kept) for kept in slots]}


def _mask(checkpoint: DistCheckpoint, layer: int) -> list[bool]:
    own = f"decoder.layers.{layer}.mlp.router.{MASK}"
    if own in checkpoint.shapes:
        return checkpoint.read(own).tolist()
    return checkpoint.read(f"decoder.layers.mlp.router.{MASK}", (layer,)).tolist()
