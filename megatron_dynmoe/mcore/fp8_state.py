"""What moves the delayed scales of FP8 experts: the end of a step, and checkpoints into other experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dynmoe.mcore.fp8_experts import Fp8GroupedMLP, is_ours


def update_scales(chunks: Iterable[nn.Module]) -> None:
    """End a step: new scales from the largest amax that any rank with the same experts has seen.

    Transformer Engine reduces over all data-parallel ranks of the stage, which under expert parallelism hold different
    experts under one index.  Here it is over those that hold the same ones (expert-tensor and expert-data parallel), so
    the scales of an expert do not depend on where it is, and a checkpoint of any layout has one set of them.

    Every rank calls it with its own part of the model, once a step.

    Args:
        chunks: the model's parts on this rank; those without FP8 experts, or without delayed scales, are passed by.
    """
    experts = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Fp8GroupedMLP) and m.scales]
    if not experts:
        return
    scales = [scales for module in experts for scales in module.scales.values()]
    seen = [one.amax_history[0] for one in scales]
    # What is NaN on one rank shall be no number on all: an infinity survives a maximum.
    amax = torch.cat([tensor.flatten() for tensor in seen]).nan_to_num(nan=torch.inf, posinf=torch.inf)
    for group in (experts[0].tp_group, experts[0].dp_group):
        if group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    pieces: tuple[Tensor, ...] = amax.split([tensor.numel() for tensor in seen])
    for one, tensor, piece in zip(scales, seen, pieces, strict=True):
        one.update(piece.view_as(tensor))


def then_update_scales(finalize: Callable[..., None]) -> Callable[..., None]:
    """``finalize``, a function like megatron-core's ``finalize_model_grads``, and :func:`update_scales` behind it."""

    def finalize_and_update(model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        update_scales(model)

    return finalize_and_update


def pass_by_scales(experts: nn.Module) -> None:
    """Let Transformer Engine's ``experts`` load a checkpoint of :class:`Fp8GroupedMLP`.

    They take bytes in ``_extra_state`` and raise at anything else; an empty tensor says that there is nothing.
    """
    experts._register_load_state_dict_pre_hook(_drop_scales)


def _drop_scales(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key, value in state.items():
        if key.startswith(prefix) and is_ours(value):
            state[key] = torch.empty(0, dtype=torch.uint8)
