"""Transformer Engine's grouped experts, whose delayed FP8 scales find their expert again in every layout.

Transformer Engine 2 lays scales and histories of a grouped linear layer out expert by expert, three roles each forward
(input, weight, output) and two backward (module/grouped_linear.py:1757). megatron-core 0.19.2 cuts them up for a
checkpoint, and joins them, as if they lay role by role (extensions/transformer_engine.py, ``_split_extra_state`` and
``merge_extra_states``). Both errors cancel while a rank has the same number of experts. With another
``--expert-model-parallel-size`` inputs are cast by weights' scales, other experts' among them, and nothing complains.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import Tensor

# Entries of the state, and the roles that they have of each expert.
_ROLES = {"scale_fwd": 3, "amax_history_fwd": 3, "scale_bwd": 2, "amax_history_bwd": 2}
# Says in a checkpoint that an expert's entry has that expert's scales; megatron-core's own have not.
_MARK = "scales_of_one_expert"


class ScalesByExpert:
    """Mixed into a subclass of ``TEGroupedLinear``."""

    num_gemms: int
    _joined = False

    def _split_extra_state(self, state: Any) -> list[Any]:
        """megatron-core's, on scales that lie as it expects them; one entry an expert."""
        found = self._decode_extra_state(state) if isinstance(state, Tensor) else None
        if not _has_scales(found):
            return super()._split_extra_state(state)
        states = super()._split_extra_state(self._encode_extra_state(self._turned(found, to_roles=True)))
        return [self._encode_extra_state(self._decode_extra_state(one) | {_MARK: True}) for one in states]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        first = state_dict.get(f"{prefix}_extra_state")
        split = f"{prefix}_extra_state1" in state_dict and isinstance(first, Tensor)
        found = self._decode_extra_state(first) if split else None
        self._joined = isinstance(found, dict) and _MARK in found
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            self._joined = False

    def set_extra_state(self, state: Any) -> None:
        """Transformer Engine's, after megatron-core has joined the experts' entries role by role."""
        if self._joined and isinstance(state, Tensor) and _has_scales(found := self._decode_extra_state(state)):
            state = self._encode_extra_state(self._turned(found, to_roles=False))
        super().set_extra_state(state)

    def _turned(self, state: dict[str, Any], *, to_roles: bool) -> dict[str, Any]:
        """Of each entry [..., experts x roles] the last axis role by role, or back."""
        turned = {key: value for key, value in state.items() if key != _MARK}
        for name, roles in _ROLES.items():
            value = state[name]
            shape = (self.num_gemms, roles) if to_roles else (roles, self.num_gemms)
            turned[name] = value.view(*value.shape[:-1], *shape).transpose(-1, -2).reshape(value.shape)
        return turned


def _has_scales(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(state.get(name), Tensor) for name in _ROLES)


def with_scales_by_expert(experts: partial) -> partial:
    """A copy of what builds a ``TEGroupedMLP``, with linear layers that are also :class:`ScalesByExpert`."""
    parts = experts.keywords["submodules"]
    linear = {name: _subclass(getattr(parts, name)) for name in ("linear_fc1", "linear_fc2")}
    return partial(experts.func, *experts.args, **(experts.keywords | {"submodules": replace(parts, **linear)}))


@cache
def _subclass(linear: Any) -> Any:
    """Of one name with its base, which megatron-core looks modules up by."""
    if not isinstance(linear, type) or issubclass(linear, ScalesByExpert) or not hasattr(linear, "_split_extra_state"):
        return linear
    return type(linear.__name__, (ScalesByExpert, linear), {"__doc__": linear.__doc__, "__module__": linear.__module__})
