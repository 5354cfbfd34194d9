"""Drives the adaptive routers of a model through training: sums their records over ranks, removes and adds experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.controllers import Change, Schedule, adapt
from megatron_dynmoe.mcore.adaptive_router import AdaptiveRouter
from megatron_dynmoe.mcore.layer import DynMoELayer
from megatron_dynmoe.mcore.slots import Slice, check_optimizer, expert_weights, write


@dataclass(frozen=True)
class Event:
    """One layer's update: slots ``removed`` and ``added`` after ``iteration``, ``active`` experts then.

    ``unrouted`` tokens of the window had activated nobody.  Layers count from 0.
    """

    iteration: int
    layer: int
    removed: list[int]
    added: list[int]
    active: int
    unrouted: int

    def __str__(self) -> str:
        done = [f"{verb} {', '.join(map(str, slots))}" for verb, slots in self._parts() if slots]
        return f"layer {self.layer}: {'; '.join(done) or 'no change'}; {self.active} experts active"

    def _parts(self) -> list[tuple[str, list[int]]]:
        return [("removed", self.removed), ("added", self.added)]


class ExpertAdaptation:
    """Records and updates on a schedule (:meth:`after_step`), or by hand (:meth:`begin`, :meth:`end`).

    Every rank calls the same methods in the same order.

    Args:
        dynmoe: schedule and policies.
        chunks: the model's parts on this rank; :meth:`watch` adds to them.
        optimizer: Megatron's; found through the model's configuration when training runs, if not given.
        seed: of the weights of added experts, with ``added_expert_init`` "fresh".
    """

    def __init__(
        self, dynmoe: DynMoEConfig, chunks: tuple[Any, ...] = (), optimizer: Any = None, seed: int = 0
    ) -> None:
        self.dynmoe, self.chunks, self.seed = dynmoe, list(chunks), seed
        self.plan = Schedule(dynmoe.record_from, dynmoe.update_at, dynmoe.update_period)
        self._optimizer = optimizer
        self._events: list[Event] = []

    def watch(self, chunk: Any) -> None:
        """Add a part of the model, once; its routers record from the first iteration on if the schedule says so.

        Raises:
            ConfigError: the optimizer's state cannot be reached; said here, not at the first update.
        """
        if any(chunk is known for known in self.chunks):
            return
        self.chunks.append(chunk)
        self.optimizer()
        for layer in _layers([chunk]):
            self._open_or_close(layer.router)

    @property
    def layers(self) -> list[DynMoELayer]:
        """The layers of this rank whose experts adapt."""
        return _layers(self.chunks)

    def begin(self) -> None:
        """Start recording, whatever the schedule."""
        for layer in self.layers:
            layer.router.clear()
            layer.router.set_schedule(recording=True)

    def end(self, iteration: int = 0) -> list[Event]:
        """Stop recording, remove and add experts; what was done on this rank's layers."""
        self._collect()
        events = self._update(iteration)
        for layer in self.layers:
            layer.router.set_schedule(recording=False)
        return events

    def after_step(self, iteration: int) -> None:
        """After the optimizer's step: take in what was recorded, update if it is time, move on in the schedule."""
        layers = self.layers
        if not layers:
            return
        router = layers[0].router
        if router.recording:
            self._collect()
            if self.plan.updates(router.steps):
                self._events += self._update(iteration)
        for layer in layers:
            layer.router.set_schedule(steps=layer.router.steps + 1)
            self._open_or_close(layer.router)

    def _open_or_close(self, router: AdaptiveRouter) -> None:
        if self.plan.period > 0:
            router.set_schedule(recording=self.plan.records(router.steps))

    def _collect(self) -> None:
        """Sum what each rank has seen since the last step and add it to the records: two all-reduces for all layers."""
        layers = self.layers
        if not layers:
            return
        group = layers[0].router.tp_dp_cp_group
        for names in (("rows_E", "unrouted_B"), ("sums_BD",)):
            seen = [getattr(layer.router.this_step, name) for layer in layers for name in names]
            kept = [getattr(layer.router.recorded, name) for layer in layers for name in names]
            total = torch.cat([tensor.flatten() for tensor in seen])
            dist.all_reduce(total, group=group)
            pieces = total.split([tensor.numel() for tensor in seen])
            for mine, all_ranks, piece in zip(seen, kept, pieces, strict=True):
                all_ranks += piece.view_as(all_ranks)
                mine.zero_()

    def _update(self, iteration: int) -> list[Event]:
        self._gather_weights()
        events = []
        for layer in self.layers:
            router = layer.router
            change = adapt(router.experts_mask, router.recorded, router.weight, max_added=self.dynmoe.max_added_experts)
            self._write(layer, change)
            change.apply(router.experts_mask)
            router.clear()
            active = int(router.experts_mask.sum())
            events.append(Event(iteration, router.layer_index, change.removed, change.added, active, change.unrouted))
        return events

    def optimizer(self) -> Any:
        """Megatron's optimizer: given, or found as the owner of the model configuration's ``grad_scale_func``."""
        if self._optimizer is None and self.chunks:
            self._optimizer = getattr(get_model_config(self.chunks[0]).grad_scale_func, "__self__", None)
            if self._optimizer is not None:
                check_optimizer(self._optimizer)
        return self._optimizer

    def _gather_weights(self) -> None:
        """With the parameter gather overlapped, weights are stale between a step and the next forward pass."""
        for chunk in self.chunks:
            ddp = getattr(chunk, "ddp_config", None)
            if ddp is not None and ddp.overlap_param_gather and self.optimizer() is not None:
                self.optimizer().prepare_model_params_for_param_sync()
                chunk.start_param_sync(force_sync=True)

    def _write(self, layer: DynMoELayer, change: Change) -> None:
        router, optimizer = layer.router, self.optimizer()
        if change.embeddings_AD is None:
            return
        for slot, embedding, similar in zip(change.added, change.embeddings_AD, change.similar, strict=True):
            write(optimizer, Slice(router.weight, slot), embedding, reset=True)
            write(optimizer, Slice(router.thresholds, slot), router.thresholds.new_zeros(()), reset=True)
            if self.dynmoe.added_expert_init == "fresh":
                self._fresh(layer, slot)
            elif self.dynmoe.added_expert_init == "copy":
                self._copy(layer, slot, similar)

    def _fresh(self, layer: DynMoELayer, slot: int) -> None:
        """New weights, drawn whole on the CPU so that they do not depend on the layout."""
        local = slot - layer.ep_group.rank() * layer.num_local_experts
        if not 0 <= local < layer.num_local_experts:
            return
        config, rank = layer.config, layer.experts.tp_group.rank()
        steps, number = layer.router.steps, layer.router.layer_index + 1
        halves = 2 if config.gated_linear_unit else 1
        width, inner = config.hidden_size, config.moe_ffn_hidden_size
        with torch.random.fork_rng(devices=[]):  # torch.manual_seed would seed CUDA too, and on this rank alone
            torch.default_generator.manual_seed(((self.seed * 1_000_003 + steps) * 1009 + number) * 1009 + slot)
            fc1, fc2 = torch.empty(halves * inner, width, device="cpu"), torch.empty(width, inner, device="cpu")
            config.init_method(fc1)
            config.output_layer_init_method(fc2)
        weights = expert_weights(layer.experts, local)
        share = slice(rank * weights[1].data.shape[1], (rank + 1) * weights[1].data.shape[1])
        fc1 = fc1.view(halves, inner, width)[:, share].reshape(weights[0].data.shape)
        for where, value in zip(weights, (fc1, fc2[:, share]), strict=True):
            write(self.optimizer(), where, value.to(where.data.device), reset=True)

    def _copy(self, layer: DynMoELayer, slot: int, source: int) -> None:
        """The weights of expert ``source``, which may be on another rank."""
        mine, group, local = layer.ep_group.rank(), layer.ep_group, layer.num_local_experts
        for part in range(2):
            like = expert_weights(layer.experts, source % local)[part].data
            weight = like.clone() if mine == source // local else torch.empty_like(like)
            if slot // local != source // local:
                dist.broadcast(weight, src=dist.get_global_rank(group, source // local), group=group)
            if mine == slot // local:
                write(self.optimizer(), expert_weights(layer.experts, slot % local)[part], weight, reset=True)

    def state_of_all_stages(self) -> tuple[list[Event], dict[int, dict[str, float]]]:
        """Events since the last call, and for each layer its active experts and thresholds, from all pipeline stages.

        Every rank calls it; ranks that hold the same layers say the same.
        """
        self._gather_weights()
        mine = (self._events, {layer.router.layer_index: _describe(layer.router) for layer in self.layers})
        self._events = []
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, mine)
        events = {(event.iteration, event.layer): event for part, _ in said for event in part}
        layers = {layer: about for _, part in said for layer, about in part.items()}
        return [events[key] for key in sorted(events)], dict(sorted(layers.items()))


def _layers(chunks: list[Any]) -> list[DynMoELayer]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    return [m for m in modules if isinstance(m, DynMoELayer) and isinstance(m.router, AdaptiveRouter)]


def _describe(router: AdaptiveRouter) -> dict[str, float]:
    thresholds: Tensor = router.thresholds.detach()[router.experts_mask].float()
    mean, least, most = (
        float(f(thresholds)) if len(thresholds) else 0.0 for f in (Tensor.mean, Tensor.min, Tensor.max)
    )
    return {"active": int(router.experts_mask.sum()), "threshold": mean, "least": least, "most": most}
