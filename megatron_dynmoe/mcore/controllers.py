"""Drives the controllers of a model's routers through training: sums what they counted, ends their steps, reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.controlled import ControlledRouter
from megatron_dynmoe.mcore.slots import LayerExperts, check_optimizer
from megatron_dynmoe.routers.controller import Step

# What a layer reports, by name: a number, or a list of them.
Report = dict[str, Any]


class Driver:
    """Every rank calls the same methods in the same order.

    In training: :meth:`before_pass` before each forward step, :meth:`after_step` after the optimizer's.  By hand:
    :meth:`call`.

    Args:
        dynmoe: of the model's routers.
        chunks: the model's parts on this rank; :meth:`before_pass` adds to them.
        optimizer: Megatron's; found through the model's configuration when training runs, if not given.
        seed: of weights that a controller draws.
    """

    def __init__(
        self, dynmoe: DynMoEConfig, chunks: tuple[Any, ...] = (), optimizer: Any = None, seed: int = 0
    ) -> None:
        self.dynmoe, self.seed, self._optimizer = dynmoe, seed, optimizer
        self.kinds = dynmoe.controllers
        self.chunks: list[Any] = []
        self.layers: list[Any] = []
        self._attempt: Any = None
        self._counted = False
        self._events: list[Any] = []
        for chunk in chunks:
            self._watch(chunk)

    def before_pass(self, chunk: Any) -> None:
        """Take note of a part of the model; where Megatron runs a step again, drop what the first run counted.

        Raises:
            ConfigError: the optimizer's state cannot be reached; said here, not at the first update.
        """
        if not any(chunk is known for known in self.chunks):
            self._watch(chunk)
        if not (self.kinds and chunk.training):
            return
        machine = get_rerun_state_machine()
        attempt = machine.current_iteration, machine.state
        if attempt != self._attempt:
            if self._counted:
                self._forget()
            self._attempt, self._counted = attempt, True

    def _watch(self, chunk: Any) -> None:
        self.chunks.append(chunk)
        self.layers += [m for m in chunk.modules() if isinstance(getattr(m, "router", None), ControlledRouter)]
        self.optimizer()

    def after_step(self, iteration: int, *, taken: bool = True) -> None:
        """After an iteration: where the optimizer took its step, let the controllers take theirs.

        ``taken`` is the same on all ranks; Megatron steps its learning rate by it, too (training.py:2518).
        """
        if taken:
            self._events += self.call("after_step", iteration)
        else:
            self._forget()

    @torch.no_grad()
    def call(self, method: str, iteration: int = 0) -> list[Any]:
        """Call a method like ``after_step`` of every controller that has it; what they return, without ``None``."""
        if not self.kinds or not self.layers:
            return []
        self._reduce()
        gather, events = _once(self.gather_weights), []
        for layer in self.layers:
            router = layer.router
            experts = LayerExperts(layer, self.optimizer(), seed=self.seed, gather=gather)
            for number, controller in enumerate(router.controllers):
                if hasattr(controller, method):
                    step = Step(iteration, router.layer_index, router.host[number], experts)
                    event = getattr(controller, method)(router.state(number), router.counts(number), step)
                    events += [] if event is None else [event]
        self._forget()
        self._refresh()
        return events

    def _reduce(self) -> None:
        """Sum counts over all ranks that hold the routers: one all-reduce for all layers and controllers, by dtype."""
        routers = [layer.router for layer in self.layers]
        counts = [
            t
            for r in routers
            for n, c in enumerate(r.controllers)
            if c.observes(r.host[n])
            for t in r.counts(n).values()
        ]
        # Without sequence parallelism tensor-parallel ranks have the same tokens: the first one's count.
        alone = routers[0].config.sequence_parallel or routers[0].tp_group.rank() == 0
        for dtype in dict.fromkeys(tensor.dtype for tensor in counts):
            same = [tensor for tensor in counts if tensor.dtype == dtype]
            total = torch.cat([tensor.flatten() for tensor in same])
            dist.all_reduce(total if alone else total.zero_(), group=routers[0].tp_dp_cp_group)
            pieces: tuple[Tensor, ...] = total.split([tensor.numel() for tensor in same])
            for tensor, piece in zip(same, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    def _refresh(self) -> None:
        """One copy to the host for all layers."""
        hosted = [layer.router.hosted() for layer in self.layers]
        values = _to_host([tensor for tensors in hosted for tensor in tensors])
        for layer, tensors in zip(self.layers, hosted, strict=True):
            layer.router.take([value for _ in tensors for value in next(values)])

    def _forget(self) -> None:
        self._counted = False
        for layer in self.layers:
            layer.router.forget_counts()

    def optimizer(self) -> Any:
        """Megatron's optimizer: given, or found as the owner of the model configuration's ``grad_scale_func``."""
        if self._optimizer is None and self.chunks:
            self._optimizer = getattr(get_model_config(self.chunks[0]).grad_scale_func, "__self__", None)
            writing = [kind for kind in self.kinds if kind.writes]
            if self._optimizer is not None and writing:
                check_optimizer(self._optimizer, writing[0].flag or f"the controller {writing[0].__name__}")
        return self._optimizer

    def gather_weights(self) -> None:
        """With the parameter gather overlapped, weights are stale between a step and the next forward pass."""
        for chunk in self.chunks:
            ddp = getattr(chunk, "ddp_config", None)
            if ddp is not None and ddp.overlap_param_gather and self.optimizer() is not None:
                self.optimizer().prepare_model_params_for_param_sync()
                chunk.start_param_sync(force_sync=True)

    def reports(self) -> bool:
        """Whether there is anything to report: the same on all ranks."""
        return bool(self.kinds) or any(method.log is not None for method in self.dynmoe.methods)

    def report(self) -> tuple[list[Any], dict[int, Report]]:
        """Events since the last call, and what each layer reports, from all pipeline stages.  Every rank calls it."""
        if any(method.log is not None for method in self.dynmoe.methods):
            self.gather_weights()
        mine = self._events, self._described()
        self._events = []
        group = parallel_state.get_pipeline_model_parallel_group()
        said: list[Any] = [None] * group.size()
        dist.all_gather_object(said, mine, group=group)
        layers = {layer: about for _, part in said for layer, about in part.items()}
        events = [event for part, _ in said for event in part]
        return sorted(events, key=lambda event: (event.iteration, event.layer)), dict(sorted(layers.items()))

    @torch.no_grad()
    def _described(self) -> dict[int, Report]:
        found = {layer.router.layer_index: dict(_reported(layer.router)) for layer in self.layers}
        values = _to_host([tensor.double().flatten() for about in found.values() for tensor in about.values()])
        return {
            layer: {name: _plain(tensor, next(values)) for name, tensor in about.items()}
            for layer, about in found.items()
        }


def _reported(router: ControlledRouter) -> Iterator[tuple[str, Tensor]]:
    for number, controller in enumerate(router.controllers):
        yield from controller.report(router.state(number)).items()
    parameters = {name: getattr(router, name) for name in router.learned}
    for method in router.dynmoe.methods:
        if method.log is not None:
            yield from method.log(router.dynmoe, parameters, router.active_E).items()


def _to_host(tensors: list[Tensor]) -> Iterator[list[float]]:
    """The values of float64 vectors, each a list, in one copy."""
    values = torch.cat(tensors).tolist() if tensors else []
    at = 0
    for tensor in tensors:
        yield values[at : at + len(tensor)]
        at += len(tensor)


def _plain(tensor: Tensor, values: list[float]) -> Any:
    numbers = values if tensor.is_floating_point() else [int(value) for value in values]
    return numbers if tensor.dim() else numbers[0]


def _once(function: Callable[[], None]) -> Callable[[], None]:
    done: list[bool] = []

    def call() -> None:
        if not done:
            done.append(True)
            function()

    return call
