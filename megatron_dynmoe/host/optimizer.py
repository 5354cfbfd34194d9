"""Checkpoints of megatron's distributed optimizer over torch's AdamW."""

import functools
from contextlib import ExitStack
from typing import Any

import torch

from megatron_dynmoe.host.replace import replace


def redirect_optimizer(undo: ExitStack) -> None:
    """Let megatron's distributed optimizer load a checkpoint into torch's AdamW.

    Three things are in the way in megatron/core/optimizer/distrib_optimizer.py of 0.19.2. ``state_dict``, which loading
    asks for the structure to fill, wants a ``step`` before there was one (839). Loading then puts one tensor in the
    place of all parameters' steps (1032), to which each of them would add 1. When it copies the tensors of a parameter,
    it looks for ``step`` among them (1223), but the formats that may change layout leave it out.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    copy_tensors = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def state_dict_of_started(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()  # what megatron does on load where fused Adam is installed
        return state_dict(self)

    @functools.wraps(copy_tensors)
    def copy_all_but_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
        copy_tensors(self, model_param, {**tensors, "step": None})

    replace(
        undo,
        DistributedOptimizer,
        state_dict=state_dict_of_started,
        _set_main_param_and_optimizer_states=copy_all_but_step,
    )
