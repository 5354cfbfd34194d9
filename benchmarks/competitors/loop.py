"""A loop over experts: find an expert's tokens, gather them, compute, index_add the weighted result.

The way of the public Dynamic MoE (Huang et al. 2024, arXiv 2403.07652) and MoE++ (Jin et al. 2024, arXiv 2410.07348)
models. Those have no expert parallelism; with several ranks, every rank gets all tokens and loops over its own experts,
and the outputs are summed where the tokens live: the simplest way to divide such a loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.competitors.case import Case
from benchmarks.competitors.method import Method, Wire, leaf
from megatron_dynmoe.dispatch.moves import all_to_all, gather_over, reduce_scatter_over


class LoopOverExperts(Method):
    """One expert after another, each with three matrices of its own."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        width = case.setting.expert_width
        gates, ups = case.fc1_LGD[:, :width], case.fc1_LGD[:, width:]
        self.experts = [[leaf(matrix) for matrix in expert] for expert in zip(gates, ups, case.fc2_LDF, strict=True)]
        self.parameters = [matrix for expert in self.experts for matrix in expert]

    def forward(self) -> Tensor:
        setting, group = self.case.setting, self.case.group
        sizes = [setting.tokens] * setting.ep
        if setting.ep == 1:
            return self._loop(self.x_TD, self.weights_TE)
        x_SD = gather_over(self.x_TD, sizes, group)
        # [T, R, L] to rank-major rows: each rank gets the weights for its own experts.
        weights = self.weights_TE.view(setting.tokens, setting.ep, -1).transpose(0, 1).flatten(0, 1)
        return reduce_scatter_over(self._loop(x_SD, all_to_all(weights, sizes, sizes, group)), sizes, group)

    def _loop(self, x_TD: Tensor, weights_TL: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for index, (gate, up, down) in enumerate(self.experts):
            (token_M,) = torch.where(weights_TL[:, index] > 0)
            rows_MD = x_TD[token_M]
            y_MD = F.linear(F.silu(F.linear(rows_MD, gate)) * F.linear(rows_MD, up), down)
            y_MD = y_MD * weights_TL[token_M, index].unsqueeze(-1)
            out_TD.index_add_(0, token_M, y_MD.to(x_TD.dtype))
        return out_TD

    def expert_grads(self) -> tuple[Tensor, Tensor]:
        fc1 = [torch.cat([gate.grad, up.grad]) for gate, up, _ in self.experts]
        return torch.stack(fc1), torch.stack([down.grad for _, _, down in self.experts])

    def wire(self) -> Wire:
        tokens, ranks = self.case.setting.tokens, self.case.setting.ep
        return Wire.of(self.case, [tokens] * ranks, weights_per_row=len(self.experts))
