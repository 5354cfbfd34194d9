"""Two controllers for tests: one moves top_p by what it counts, one remembers what hidden states were like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from megatron_dynmoe.routers import GATES, RULES
from megatron_dynmoe.routers.controller import Controller

TARGET, GAIN = 1.5, 0.125


@dataclass(frozen=True)
class Moved:
    """What the first one says of a step."""

    iteration: int
    layer: int
    rows: int

    def __str__(self) -> str:
        return f"[toy] iteration {self.iteration}: layer {self.layer} took {self.rows} rows"


class Tuner(Controller):
    """Moves top_p towards a mean of ``TARGET`` experts a token."""

    sets: ClassVar[tuple[str, ...]] = ("top_p",)
    reads: ClassVar[tuple[str, ...]] = ("steps",)
    events: ClassVar[str] = "toy_events"

    def state(self):
        return {"top_p": self.config.top_p, "tokens_seen": torch.zeros((), dtype=torch.int64), "steps": [0, 0]}

    def counts(self):
        return {"tokens": torch.zeros((), dtype=torch.int64), "rows_E": torch.zeros(self.columns, dtype=torch.int64)}

    def observe(self, counts, seen):
        assert seen.host == {"top_p": seen.host["top_p"], "steps": seen.host["steps"]}
        counts["tokens"] += seen.valid_T.sum()
        counts["rows_E"] += seen.routing.map_TC.sum(dim=0)

    def after_step(self, state, totals, step):
        mean = totals["rows_E"].sum() / totals["tokens"]
        state["top_p"].add_(GAIN * (TARGET - mean)).clamp_(0, 1)
        state["tokens_seen"] += totals["tokens"]
        state["steps"][0] += 1
        state["steps"][1] += totals["rows_E"].sum()
        assert step.host["steps"][0] + 1 == int(state["steps"][0])
        return Moved(step.iteration, step.layer, int(totals["rows_E"].sum()))

    def report(self, state):
        return super().report(state) | {"tokens_seen": state["tokens_seen"], "rows_seen": state["steps"][1]}


class Averager(Controller):
    """Remembers the sum of hidden states; its counts have the names of the other's, which is no clash."""

    def state(self):
        return {"sum_D": torch.zeros(self.width), "tokens_summed": torch.zeros((), dtype=torch.int64)}

    def counts(self):
        return {"rows_E": torch.zeros(self.width), "tokens": torch.zeros((), dtype=torch.int64)}

    def observe(self, counts, seen):
        valid_TD = torch.where(seen.valid_T.unsqueeze(-1), seen.x_TD.float(), 0.0)
        counts["rows_E"] += valid_TD.sum(dim=0)
        counts["tokens"] += seen.valid_T.sum()

    def after_step(self, state, totals, step):
        state["sum_D"] += totals["rows_E"]
        state["tokens_summed"] += totals["tokens"]

    def report(self, state):
        return {"tokens_summed": state["tokens_summed"], "hidden_sums": state["sum_D"][:2]}


def install(*, rule: type[Controller] | None = Tuner, gate: type[Controller] | None = Averager) -> None:
    """Give both to rule 'top-p' and gate 'softmax', in this process."""
    RULES["top-p"] = replace(RULES["top-p"], controller=rule)
    GATES["softmax"] = replace(GATES["softmax"], controller=gate)
