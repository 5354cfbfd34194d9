"""The floor: the experts' two grouped GEMMs alone, on rows that lie ready; no activation, no moves.

On a CPU the library multiplies otherwise; those products alone are a second floor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.competitors.method import NotPossible, StackedMethod, Wire, leaf
from megatron_dynmoe.experts import by_chunk
from megatron_dynmoe.experts.products import product_for
from megatron_dynmoe.routing import RoutePlan


class Floor(StackedMethod):
    """Six GEMMs over the same ragged groups: two forward, and for each two backward (input, weight)."""

    def __init__(self, case) -> None:
        super().__init__(case)
        plan = RoutePlan.build(case.map_TE, group=case.group, expert_rank=case.rank, expert_ranks=case.setting.ep)
        rows_L = torch.tensor(plan.rows_per_expert_L, device=case.x_TD.device)
        self.ends_L = rows_L.cumsum(0).to(torch.int32)
        self.rows_per_expert_L = plan.rows_per_expert_L
        self.rows = sum(plan.rows_per_expert_L)
        self.inputs = [leaf(self._some(case.fc1_LGD.shape[2])), leaf(self._some(case.fc2_LDF.shape[2]))]
        self.grads = [self._some(case.fc1_LGD.shape[1]), self._some(case.fc2_LDF.shape[1])]

    def _some(self, width: int) -> Tensor:
        return torch.randn(self.rows, width, device=self.case.x_TD.device).to(self.case.x_TD.dtype)

    def forward(self) -> Tensor:
        raise NotImplementedError("the floor has no output; step() runs its GEMMs.")

    def step(self) -> list[Tensor]:
        if self.rows == 0:
            return []
        outs = [
            F.grouped_mm(rows, weight.transpose(1, 2), offs=self.ends_L)
            for rows, weight in zip(self.inputs, self.parameters, strict=True)
        ]
        torch.autograd.backward(outs, self.grads)
        return outs

    def clear(self) -> None:
        super().clear()
        for rows in self.inputs:
            rows.grad = None

    def wire(self) -> Wire:
        return Wire(0, 0)


class OwnProducts(Floor):
    """The same six products as the library makes them on a CPU, chunk by chunk; their results are dropped."""

    def __init__(self, case) -> None:
        super().__init__(case)
        if case.x_TD.device.type != "cpu":
            raise NotPossible("off the CPU the library's products are the floor's.")
        self.linear, pad = product_for(case.x_TD, case.fc2_LDF[0])
        self.plan = list(by_chunk.chunks(self.rows_per_expert_L, by_chunk.limit_of(case.fc2_LDF), pad=pad))

    def step(self) -> None:
        (rows_ND, inner_NF), (hidden_NG, out_ND), linear = self.inputs, self.grads, self.linear
        with torch.no_grad():
            for chunk in self.plan:
                fc1, fc2 = (weight[chunk.expert] for weight in self.parameters)
                rows, inner, hidden, out = (chunk.of(one) for one in (rows_ND, inner_NF, hidden_NG, out_ND))
                for x, weight in ((rows, fc1), (inner, fc2)):
                    linear(x, weight)
                for grad, x, weight in ((out, inner, fc2), (hidden, rows, fc1)):
                    linear(grad, weight.t())
                    linear(grad.t(), x.t())
