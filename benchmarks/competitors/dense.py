"""Dense [T, E, C] dispatch: einsum with one-hot tensors, every expert padded to the capacity C.

The way of GShard (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1) and the codes after it. DynMoE's (Guo et al.
2024, arXiv 2405.14297) drops nothing: its C is the largest number of tokens that any rank has for any expert. Here the
one-hot tensor is made as booleans and turned into the model's dtype once, which is the leanest form of the scheme.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.competitors.method import StackedMethod, Wire, swiglu
from megatron_dynmoe.dispatch.moves import all_to_all


class DenseDispatch(StackedMethod):
    """Slots instead of rows: E * C of them leave each rank, filled or not."""

    def forward(self) -> Tensor:
        setting, group = self.case.setting, self.case.group
        tokens, width, experts, ranks = setting.tokens, setting.width, setting.experts, setting.ep
        slot_TEC = self._one_hot()
        capacity, local = slot_TEC.shape[2], experts // ranks
        combine_TEC = (self.weights_TE.unsqueeze(-1) * slot_TEC).to(self.x_TD.dtype)
        sent = torch.einsum("tec,td->ecd", slot_TEC.to(self.x_TD.dtype), self.x_TD)
        self.slots = [local * capacity] * ranks
        arrived = all_to_all(sent.view(experts * capacity, width), self.slots, self.slots, group)
        inputs = arrived.view(ranks, local, capacity, width).transpose(0, 1).reshape(local, -1, width)
        fc1, fc2 = self.parameters
        out = torch.bmm(swiglu(torch.bmm(inputs, fc1.transpose(1, 2))), fc2.transpose(1, 2))
        out = out.view(local, ranks, capacity, width).transpose(0, 1).reshape(experts * capacity, width)
        back = all_to_all(out, self.slots, self.slots, group).view(experts, capacity, width)
        return torch.einsum("tec,ecd->td", combine_TEC, back).view(tokens, width)

    def _one_hot(self) -> Tensor:
        """bool [T, E, C]: the slot of each (token, expert) pair."""
        map_TE = self.case.map_TE
        counts = map_TE.sum(dim=0).max()
        if self.case.setting.ep > 1:
            dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self.case.group)
        place_TE = torch.where(map_TE, map_TE.cumsum(dim=0) - 1, -1)
        return place_TE.unsqueeze(-1) == torch.arange(int(counts), device=map_TE.device)

    def wire(self) -> Wire:
        return Wire.of(self.case, self.slots, weights_per_row=0)
