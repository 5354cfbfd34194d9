"""The state of delayed scaling: for each expert the scales of its input, its weight and its gradient, and their amax.

The rule is Transformer Engine's (pytorch/quantization.py, _amax_and_scale_update).  The unit of time is another one: it
updates after each micro-batch, this after each step.  So all micro-batches of a step share their scales, a layer that
is computed again in the backward pass is the same, and the largest amax of the step is kept once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dynmoe.experts.fp8 import Fp8Recipe

INPUT, WEIGHT, GRADIENT = range(3)
# Passes without an update that no accumulation of gradients explains.
_MOST_PASSES = 10_000


class DelayedScales(torch.nn.Module):
    """Scales of one linear layer of L experts.  They start at 1, as Transformer Engine's do.

    Buffers, float32 whatever the model's dtype: ``scale`` [L, 3] and ``amax_history`` [H, L, 3].  Its first entry is
    the amax of this step so far; behind it the older ones stand from the oldest to the latest.
    """

    def __init__(self, experts: int, recipe: Fp8Recipe) -> None:
        super().__init__()
        self.recipe, self.passes = recipe, 0
        self.scale: Tensor
        self.amax_history: Tensor
        # Not in the state dict: the module that owns this saves them expert by expert.
        self.register_buffer("scale", torch.ones(experts, 3), persistent=False)
        self.register_buffer("amax_history", torch.zeros(recipe.amax_history_len, experts, 3), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> DelayedScales:
        """Moves to another device move the buffers; changes of dtype pass them by."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def observe(self, which: int, amax_L: Tensor) -> None:
        """Keep the larger amax of this step.

        Args:
            which: INPUT, WEIGHT or GRADIENT.
            amax_L: float32; 0 for an expert without rows.

        Raises:
            RuntimeError: nobody has called :meth:`update` for very long.
        """
        self.passes += which == GRADIENT
        if self.passes > _MOST_PASSES:
            raise RuntimeError(
                f"delayed FP8 scales were not updated in {_MOST_PASSES} passes; call "
                "megatron_dynmoe.mcore.fp8_state.update_scales(model) after each step, as the training entry does."
            )
        now_L = self.amax_history[0, :, which]
        now_L.copy_(torch.maximum(now_L, amax_L))  # NaN stays NaN

    @torch.no_grad()
    def update(self, amax_L3: Tensor) -> None:
        """End a step.

        Args:
            amax_L3: of this step, the largest of all ranks that hold these experts; where it is 0, infinite or NaN the
                scale stays.
        """
        self.passes = 0
        history, recipe = self.amax_history, self.recipe
        history[0] = amax_L3
        amax = history.amax(dim=0) if recipe.amax_compute_algo == "max" else history[0]
        limits = [
            torch.finfo(dtype).max for dtype in (recipe.forward_dtype, recipe.forward_dtype, recipe.gradient_dtype)
        ]
        wanted = history.new_tensor(limits) / amax / 2.0**recipe.margin
        wanted = wanted.clamp_max(torch.finfo(torch.float32).max)
        self.scale.copy_(torch.where((amax > 0) & amax.isfinite(), wanted, self.scale))
        self.amax_history.copy_(history.roll(-1, dims=0))
        self.amax_history[0] = 0

    def of_expert(self, index: int) -> dict[str, Tensor]:
        """What is saved of one expert: ``scale`` [3] and ``amax_history`` [H, 3]."""
        return {"scale": self.scale[index].clone(), "amax_history": self.amax_history[:, index].clone()}

    @torch.no_grad()
    def load_expert(self, index: int, saved: dict[str, Tensor]) -> None:
        """The reverse; of a history of another length the latest entries are kept."""
        self.scale[index] = saved["scale"].to(self.scale)
        history, past = self.amax_history[:, index].zero_(), saved["amax_history"].to(self.scale)
        history[0] = past[0]
        kept = min(len(history), len(past)) - 1
        if kept:
            history[-kept:] = past[-kept:]
