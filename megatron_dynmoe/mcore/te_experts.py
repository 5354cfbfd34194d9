"""Transformer Engine's grouped experts, whose delayed FP8 scales find their expert again in every layout.

Transformer Engine 2 lays scales and histories of a grouped linear layer out expert by expert: of each its input, weight
and output forward, two roles backward (module/grouped_linear.py:1757). megatron-core 0.19.2 cuts them up for a
checkpoint, and joins them, as if they lay role by role (extensions/transformer_engine.py, ``_split_extra_state`` and
``merge_extra_states``). Both errors cancel while a rank has the same number of experts. With another
``--expert-model-parallel-size`` inputs are cast by weights' scales, other experts' among them, and nothing complains.

Besides it joins them after Transformer Engine has read them, where weights are kept in FP8 (module/base.py:1925).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

# Entries of the state, and how many roles they have of each expert.
_ROLES = {"scale_fwd": 3, "amax_history_fwd": 3, "scale_bwd": 2, "amax_history_bwd": 2}
# Says in a checkpoint that an expert's entry holds that expert's scales; in megatron-core's own it does not.
_MARK = "scales_of_one_expert"


class ScalesByExpert:
    """Mixed into a subclass of ``TEGroupedLinear``. Entries without the mark are read as megatron-core reads them."""

    num_gemms: int
    # Of Transformer Engine's linear layer, megatron-core's subclass.
    _decode_extra_state: Callable[[Tensor], Any]
    _encode_extra_state: Callable[[Any], Tensor]

    def _split_extra_state(self, state: Any) -> list[Any]:
        """One entry an expert: megatron-core's, on scales that lie as it expects them."""
        found = self._decode_extra_state(state) if isinstance(state, Tensor) else None
        if not isinstance(found, dict) or not found.keys() >= _ROLES.keys():
            return super()._split_extra_state(state)  # type: ignore[misc]
        for name, roles in _ROLES.items():
            by_expert = found[name].unflatten(-1, (self.num_gemms, roles))
            found[name] = by_expert.transpose(-1, -2).flatten(-2)
        states = super()._split_extra_state(self._encode_extra_state(found))  # type: ignore[misc]
        return [self._encode_extra_state(self._decode_extra_state(one) | {_MARK: True}) for one in states]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._join(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def _join(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Marked entries to the one that Transformer Engine reads; megatron-core's own joining then finds nothing."""
        keys = [f"{prefix}_extra_state{index or ''}" for index in range(self.num_gemms)]
        if not all(isinstance(state_dict.get(key), Tensor) for key in keys):
            return
        states = [self._decode_extra_state(state_dict[key]) for key in keys]
        if not all(isinstance(state, dict) and _MARK in state for state in states):
            return
        joined = {key: value for key, value in states[0].items() if key != _MARK}
        joined["extra_fp8_variables"] = joined["extra_fp8_variables"] | {"num_gemms": self.num_gemms}
        for name in _ROLES:
            joined[name] = torch.cat([state[name] for state in states], dim=-1)
        for key in keys:
            del state_dict[key]
        state_dict[keys[0]] = self._encode_extra_state(joined)


def with_scales_by_expert(experts: partial) -> partial:
    """A copy of what builds a ``TEGroupedMLP``, with linear layers that are also :class:`ScalesByExpert`."""
    parts = experts.keywords["submodules"]
    linear = {name: _subclass(getattr(parts, name)) for name in ("linear_fc1", "linear_fc2")}
    return partial(experts.func, *experts.args, **(experts.keywords | {"submodules": replace(parts, **linear)}))


@cache
def _subclass(linear: Any) -> Any:
    """Of the same name, which megatron-core looks modules up by."""
    if not isinstance(linear, type) or issubclass(linear, ScalesByExpert) or not hasattr(linear, "_split_extra_state"):
        return linear
    return type(linear.__name__, (ScalesByExpert, linear), {"__doc__": linear.__doc__, "__module__": linear.__module__})
