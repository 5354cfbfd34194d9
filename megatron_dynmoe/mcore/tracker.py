"""Where routing statistics meet megatron-core's MoE log: console, TensorBoard, W&B."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from torch import Tensor

from megatron_dynmoe.metrics import RoutingStats, RoutingSummary, Traffic
from megatron_dynmoe.routers.routing import Routing

# Called on every rank at the end of an interval: (iteration, iterations counted, summary, the training loop's sums) ->
# further scalars.
IntervalHook = Callable[[int, int, RoutingSummary, dict[str, Any]], dict[str, float]]


class StepHook(Protocol):
    """Called at the end of an iteration."""

    def __call__(self, iteration: int, *, taken: bool) -> None:
        """``taken``: the optimizer took its step."""


class RoutingTracker(MoEMetricsTracker):
    """megatron-core's per-layer loss tracker, plus counts of what was really routed.

    Counts add up on the device over ``log_interval`` iterations and are summed over all ranks once an interval.

    Args:
        num_layers: transformer layers of the model, including multi-token-prediction layers.
        num_experts: E.
        kinds: zero-computation experts by kind, in the order of their columns.
        copies: ranks that see the same tokens (tensor-parallel ranks without sequence parallelism), else 1.
        log_interval: iterations between reports.
        loss_names: losses to report besides those that the training loop asks for.
        on_interval: see :data:`IntervalHook`.
        on_step: called on every rank after each iteration, before evaluation and saving; ``taken`` says whether the
            optimizer took its step.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        kinds: dict[str, int] | None = None,
        copies: int = 1,
        log_interval: int = 1,
        loss_names: tuple[str, ...] = (),
        on_interval: IntervalHook | None = None,
        on_step: StepHook | None = None,
    ) -> None:
        super().__init__()
        self.stats = RoutingStats(num_layers, num_experts, kinds)
        self.evaluation_stats = RoutingStats(num_layers, num_experts, kinds)
        self.iteration: int | None = None  # the last one reported
        # Iterations in the counts. Megatron's own sums differ: it logs the first iteration of a run and does not reset.
        self.iterations = 0
        self._counted = (0, 0)  # iterations with and without a step, of Megatron's sums
        self.copies, self.log_interval = copies, log_interval
        self.loss_names, self.on_interval, self.on_step = loss_names, on_interval, on_step

    def observe(self, layer: int, routing: Routing, valid_T: Tensor | None, *, training: bool = True) -> None:
        """Count the routing of one micro-batch at layer ``layer`` (from 0); evaluation is counted apart."""
        (self.stats if training else self.evaluation_stats).add(layer, routing, valid_T)

    def observe_traffic(self, traffic: Traffic) -> None:
        """Count what one dispatch puts on the wire."""
        self.stats.traffic += traffic

    def report(self, loss_scale: float, iteration: int, *args: Any, **kwargs: Any) -> str:
        """megatron-core's report of the losses; at the end of an interval, ours of the routing as well."""
        self.iteration = iteration
        self.iterations += 1
        sums = kwargs.get("total_loss_dict") or {}
        taken = self._taken(sums)
        if self.on_step is not None:
            self.on_step(iteration, taken=taken)
        names = list(kwargs.get("track_names") or [])
        kwargs["track_names"] = names + [name for name in self.loss_names if name not in names]
        text = super().report(loss_scale, iteration, *args, **kwargs)
        if iteration % self.log_interval:
            return text
        summary = self.stats.reduce(divide_by=self.copies)
        scalars = summary.scalars()
        if self.on_interval is not None:
            scalars |= self.on_interval(iteration, self.iterations, summary, sums)
        self.iterations = 0
        self._log_scalars(scalars, iteration, kwargs.get("writer"), kwargs.get("wandb_writer"))
        if kwargs.get("per_layer_logging"):
            layers = {f"moe/experts_per_token_layer_{i}": k for i, k in summary.experts_per_token_by_layer.items()}
            self._log_scalars(layers, iteration, kwargs.get("writer"), kwargs.get("wandb_writer"))
        return text + "".join(f" {name.replace('_', ' ')}: {value:.4g} |" for name, value in scalars.items())

    def _taken(self, sums: dict[str, Any]) -> bool:
        """Whether the optimizer took the step of this iteration.

        Megatron counts (training.py:2601) where it has learned that every model-parallel rank did, and sets the counts
        back at the end of a log interval, but for the first iteration of a run.
        """
        advanced, skipped = sums.get("advanced iterations", 1), sums.get("skipped iterations", 0)
        before, self._counted = self._counted, (advanced, skipped)
        went_on = advanced + skipped == sum(before) + 1
        return skipped == (before[1] if went_on else 0)
