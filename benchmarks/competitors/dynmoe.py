"""Ours: exact rows along a plan, per (token, expert) or per (token, rank), and grouped GEMMs."""

from __future__ import annotations

from torch import Tensor

from benchmarks.competitors.method import StackedMethod, Wire
from megatron_dynmoe.dispatch import combine, dispatch
from megatron_dynmoe.experts import grouped_mlp
from megatron_dynmoe.routing import RoutePlan


class PerExpert(StackedMethod):
    """The library as it is: the plan is made inside the timed pass."""

    unit = "expert"

    def forward(self) -> Tensor:
        case = self.case
        plan = RoutePlan.build(case.map_TE, group=case.group, expert_rank=case.rank, expert_ranks=case.setting.ep)
        rows, weights, self.transport = dispatch(self.x_TD, self.weights_TE, plan, case.group, unit=self.unit)
        out = grouped_mlp(rows, weights, *self.parameters, plan.rows_per_expert_L)
        return combine(out, self.transport, case.setting.tokens)

    def wire(self) -> Wire:
        return Wire.of(self.case, self.transport.splits[1], weights_per_row=1)


class PerRank(PerExpert):
    """A token crosses to a rank once, with its weights for all of that rank's experts."""

    unit = "rank"

    def wire(self) -> Wire:
        return Wire.of(self.case, self.transport.splits[1], weights_per_row=self.case.fc1_LGD.shape[0])
