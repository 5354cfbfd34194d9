"""DynMoE's adaptive number of experts (Guo et al. 2024, arXiv 2405.14297, section 3.2), the controller of 'top-any'.

Experts are slots, a mask says which are active.  Over a window of iterations it is recorded how many tokens each expert
received, and what the tokens looked like that activated nobody.  At the end of the window slots that received nothing
are deactivated, and slots are activated for the tokens that went without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_dynmoe.errors import ConfigError
from megatron_dynmoe.routers.controller import Controller, Seen, State, Step

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True)
class Schedule:
    """When to record and when to update, in training iterations.

    Attributes:
        record_from, update_at: the window [record_from, update_at) of each period.
        period: iterations; 0 means never.
    """

    record_from: int
    update_at: int
    period: int

    def records(self, step: int) -> bool:
        """Whether training iteration ``step`` (from 0) is recorded."""
        return self.period > 0 and self.record_from <= step % self.period < self.update_at

    def updates(self, step: int) -> bool:
        """Whether the update comes after training iteration ``step`` (from 0), the last of a window."""
        return self.period > 0 and step % self.period == self.update_at - 1


@dataclass
class Records:
    """What a window has seen.

    Unrouted tokens fall into as many buckets as experts may be added in one update: one for all of them (DynMoE), or
    one for each expert, and a token into that of the expert with its highest score.

    Attributes:
        rows_E: int64, tokens that each expert received.
        unrouted_B: int64, tokens that activated nobody, by bucket.
        sums_BD: float32, the sum of those tokens' router inputs.
    """

    rows_E: Tensor
    unrouted_B: Tensor
    sums_BD: Tensor

    @classmethod
    def empty(cls, experts: int, width: int, *, buckets: int) -> Records:
        """Nothing seen yet."""
        counts = torch.zeros(experts, dtype=torch.int64), torch.zeros(buckets, dtype=torch.int64)
        return cls(*counts, torch.zeros(buckets, width))

    @torch.no_grad()
    def add(
        self, x_TD: Tensor, map_TE: Tensor, scores_TE: Tensor, active_E: Tensor, valid_T: Tensor | None = None
    ) -> None:
        """Count one micro-batch in place; nothing waits for the device.

        Args:
            x_TD: the router's input.
            map_TE: bool, the routing.
            scores_TE: float32.
            active_E: bool.
            valid_T: bool, the tokens that count; ``None``: all.
        """
        unrouted_T = ~map_TE.any(dim=-1)
        if valid_T is not None:
            map_TE, unrouted_T = map_TE & valid_T.unsqueeze(-1), unrouted_T & valid_T
        self.rows_E += map_TE.sum(dim=0)
        bucket_T = torch.zeros_like(unrouted_T, dtype=torch.int64)
        if len(self.unrouted_B) > 1:
            bucket_T = scores_TE.masked_fill(~active_E, -torch.inf).argmax(dim=-1)
        self.unrouted_B.index_add_(0, bucket_T, unrouted_T.long())
        # where, not a product: a routed token with an infinite value must not reach the sum.
        x_TD = torch.where(unrouted_T.unsqueeze(-1), x_TD, x_TD.new_zeros(()))
        self.sums_BD.index_add_(0, bucket_T, x_TD.to(self.sums_BD.dtype))


@dataclass(frozen=True)
class Change:
    """One update of one layer.

    Attributes:
        removed, added: slots.
        embeddings_AD: float32, a row for each added slot.
        similar: for each added slot, the active expert of before with the most similar embedding.
        unrouted: tokens of the window that activated nobody.
    """

    removed: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    embeddings_AD: Tensor | None = None
    similar: list[int] = field(default_factory=list)
    unrouted: int = 0

    def apply(self, active_E: Tensor) -> None:
        """Change the mask in place."""
        active_E[self.removed] = False
        active_E[self.added] = True


def slot_order(slots: int) -> list[int]:
    """Slots in the order in which they are filled: every prefix is spread evenly, so over expert-parallel ranks too.

    The order is that of the reversed binary digits (van der Corput); it does not depend on the layout.
    """
    digits = max(slots - 1, 1).bit_length()
    return sorted(range(slots), key=lambda slot: int(f"{slot:0{digits}b}"[::-1], 2))


def initial_mask(slots: int, active: int | None) -> Tensor:
    """bool [slots], ``active`` of them True; all if ``None``."""
    mask_E = torch.zeros(slots, dtype=torch.bool)
    mask_E[slot_order(slots)[: slots if active is None else active]] = True
    return mask_E


@torch.no_grad()
def adapt(active_E: Tensor, records: Records, weight_ED: Tensor, *, max_added: int) -> Change:
    """Remove experts that no token visited, then add some for the tokens that visited nobody.

    An added expert's embedding is the direction of its bucket's sum; its threshold is to be 0.  Buckets with more
    tokens come first.  Everything is decided by integer counts, which all ranks have; a window without any token, and
    a sum without (finite) direction, change nothing.

    Args:
        active_E: bool, before the update.
        records: of all ranks that hold the layer.
        weight_ED: the embeddings.
        max_added: at most so many are added.

    Returns:
        the change; nothing is written.
    """
    active, rows, unrouted = active_E.tolist(), records.rows_E.tolist(), records.unrouted_B.tolist()
    if sum(rows) + sum(unrouted) == 0:
        return Change()
    removed = [slot for slot, is_active in enumerate(active) if is_active and rows[slot] == 0]
    free = [slot for slot in slot_order(len(active)) if not active[slot] or slot in removed]
    norms = torch.linalg.vector_norm(records.sums_BD, dim=-1).tolist()
    buckets = [b for b in range(len(unrouted)) if unrouted[b] > 0 and 0 < norms[b] < math.inf]
    buckets = sorted(buckets, key=lambda b: -unrouted[b])[: min(max_added, len(free))]
    if not buckets:
        return Change(removed=removed, unrouted=sum(unrouted))
    embeddings_AD = torch.nn.functional.normalize(records.sums_BD[buckets], dim=-1)
    directions_ED = torch.nn.functional.normalize(weight_ED.float(), dim=-1)
    cosines_AE = (embeddings_AD @ directions_ED.t()).masked_fill(~active_E, -torch.inf)
    return Change(
        removed=removed,
        added=free[: len(buckets)],
        embeddings_AD=embeddings_AD,
        similar=cosines_AE.argmax(dim=-1).tolist(),
        unrouted=sum(unrouted),
    )


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
        parts = (("removed", self.removed), ("added", self.added))
        done = [f"{verb} {', '.join(map(str, slots))}" for verb, slots in parts if slots]
        return f"[experts] iteration {self.iteration}: layer {self.layer}: {'; '.join(done) or 'no change'}; " + (
            f"{self.active} experts active"
        )


class Adaptation(Controller):
    """Records and updates on the schedule of the configuration, or by hand where --moe-update-period is 0.

    By hand: :meth:`begin` and :meth:`end` through :meth:`megatron_dynmoe.mcore.controllers.Driver.call`.

    State: ``experts_mask`` bool [E]; ``recorded_*``, the :class:`Records` of the window up to the last step;
    ``schedule``, int64: training iterations seen, and whether what comes is recorded.

    Raises:
        ConfigError: more experts are to be active at the start than there are slots.
    """

    reads: ClassVar[tuple[str, ...]] = ("schedule",)
    events: ClassVar[str] = "expert_changes"
    flag: ClassVar[str] = "--moe-adaptive-experts"
    writes: ClassVar[bool] = True

    def __init__(self, config: RouterConfig, columns: int, width: int) -> None:
        super().__init__(config, columns, width)
        self.plan = Schedule(config.record_from, config.update_at, config.update_period)
        initial = config.initial_experts
        if initial is not None and initial > columns:
            raise ConfigError(
                f"--moe-initial-experts is {initial}; accepted: at most --num-experts, which is {columns}."
            )

    @classmethod
    def wanted(cls, config: RouterConfig) -> bool:
        """With --moe-adaptive-experts."""
        return config.adaptive_experts

    def state(self) -> dict[str, Tensor | float | list[int]]:
        """Mask, records, schedule."""
        mask_E = initial_mask(self.columns, self.config.initial_experts)
        return {"experts_mask": mask_E} | self.counts() | {"schedule": [0, 0]}

    def counts(self) -> dict[str, Tensor]:
        """Records of the step."""
        buckets = 1 if self.config.max_added_experts == 1 else self.columns
        empty = Records.empty(self.columns, self.width, buckets=buckets)
        return {f"recorded_{name}": value for name, value in vars(empty).items()}

    def active(self, state: State) -> Tensor:
        """The mask."""
        return state["experts_mask"]

    def observes(self, host: Mapping[str, Any]) -> bool:
        """While a window is open."""
        steps, recording = host["schedule"]
        return self.plan.records(steps) if self.plan.period > 0 else bool(recording)

    def observe(self, counts: State, seen: Seen) -> None:
        """Add these tokens to the records of the step."""
        routing = seen.routing
        _records(counts).add(seen.x_TD, routing.map_TE, routing.scores_TC, seen.state["experts_mask"], seen.valid_T)

    def after_step(self, state: State, totals: State, step: Step) -> Event | None:
        """Take in what was recorded, update if it is time, move on in the schedule."""
        steps, event = step.host["schedule"][0], None
        if self.observes(step.host):
            self._take(state, totals)
            if self.plan.updates(steps):
                event = self._update(state, step)
        state["schedule"][0] += 1
        if self.plan.period > 0:
            state["schedule"][1] = self.plan.records(steps + 1)
        return event

    def begin(self, state: State, totals: State, step: Step) -> None:
        """By hand: start recording."""
        self._clear(state)
        state["schedule"][1] = 1

    def end(self, state: State, totals: State, step: Step) -> Event:
        """By hand: stop recording, remove and add experts."""
        self._take(state, totals)
        state["schedule"][1] = 0
        return self._update(state, step)

    def report(self, state: State) -> dict[str, Tensor]:
        """How many experts are active."""
        return {"active_experts": state["experts_mask"].sum()}

    def _take(self, state: State, totals: State) -> None:
        for name, total in totals.items():
            state[name].add_(total)

    def _clear(self, state: State) -> None:
        for value in vars(_records(state)).values():
            value.zero_()

    def _update(self, state: State, step: Step) -> Event:
        mask_E, experts = state["experts_mask"], step.experts
        weight_ED = experts.parameter("weight")
        change = adapt(mask_E, _records(state), weight_ED, max_added=self.config.max_added_experts)
        if change.embeddings_AD is not None:
            for slot, embedding, similar in zip(change.added, change.embeddings_AD, change.similar, strict=True):
                experts.write("weight", slot, embedding)
                experts.write("thresholds", slot, embedding.new_zeros(()))
                if self.config.added_expert_init == "fresh":
                    experts.fresh(slot, step.host["schedule"][0])
                elif self.config.added_expert_init == "copy":
                    experts.copy(slot, similar)
        change.apply(mask_E)
        self._clear(state)
        active = int(mask_E.sum())
        return Event(step.iteration, step.layer, change.removed, change.added, active, change.unrouted)


def _records(tensors: State) -> Records:
    return Records(*(tensors[f"recorded_{name}"] for name in ("rows_E", "unrouted_B", "sums_BD")))
