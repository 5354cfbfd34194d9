"""A router whose experts are slots: a mask says which are active, and windows of training are recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.controllers import Records, initial_mask
from megatron_dynmoe.mcore.router import DynamicRouter
from megatron_dynmoe.routers.routing import Routing


class AdaptiveRouter(DynamicRouter):
    """:class:`DynamicRouter` over the active slots only.

    In the checkpoint: the mask, the records, and ``schedule`` (training iterations seen, whether they are being
    recorded).  What one rank has recorded since the last training step is not: it is summed over all ranks that hold
    the router, and added to the records, after each step (:mod:`megatron_dynmoe.mcore.adaptation`).
    """

    experts_mask: Tensor
    schedule: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        slots, width = self.weight.shape
        self.register_buffer("experts_mask", initial_mask(slots, self.dynmoe.initial_experts))
        buckets = 1 if self.dynmoe.max_added_experts == 1 else slots
        for prefix, persistent in (("recorded", True), ("step", False)):
            empty = Records.empty(slots, width, buckets=buckets)
            for name, value in vars(empty).items():
                self.register_buffer(f"{prefix}_{name}", value, persistent=persistent)
        self.register_buffer("schedule", torch.zeros(2, dtype=torch.int64))
        # What the buffer says, on the host, so that no forward pass waits for the device.
        self.steps, self.recording = 0, False
        self.register_load_state_dict_post_hook(_read_schedule)

    @property
    def active_E(self) -> Tensor:
        """bool [E], the active slots."""
        return self.experts_mask

    @property
    def recorded(self) -> Records:
        """What the window has seen up to the last training step, on all ranks."""
        return Records(self.recorded_rows_E, self.recorded_unrouted_B, self.recorded_sums_BD)

    @property
    def this_step(self) -> Records:
        """What this rank has seen since."""
        return Records(self.step_rows_E, self.step_unrouted_B, self.step_sums_BD)

    def clear(self) -> None:
        """Forget what was recorded."""
        for records in (self.recorded, self.this_step):
            for value in vars(records).values():
                value.zero_()

    def set_schedule(self, *, steps: int | None = None, recording: bool | None = None) -> None:
        """Set the training iterations seen, or whether what comes is recorded."""
        self.steps = self.steps if steps is None else steps
        self.recording = self.recording if recording is None else recording

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The buffer is written when it is saved, not in every step, which would be a copy to the device each.
        self.schedule.copy_(torch.tensor([self.steps, int(self.recording)]))
        super()._save_to_state_dict(*args, **kwargs)

    def record(self, x_TD: Tensor, routing: Routing, valid_T: Tensor | None) -> None:
        """Add these tokens to what this rank has seen, if a window is open."""
        if not self.recording:
            return
        self.this_step.add(x_TD, routing.map_TE, routing.scores_TC, self.experts_mask, valid_T)


def _read_schedule(module: torch.nn.Module, _: Any) -> None:
    module.steps, recording = module.schedule.tolist()
    module.recording = bool(recording)
