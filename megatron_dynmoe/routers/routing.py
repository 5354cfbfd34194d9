"""A routing decision: which experts each token visits, and with what weight.

Shape legend, used as name suffixes everywhere:
    T tokens on this rank      D model width          F expert width        E FFN experts (all ranks)
    L experts on this rank     R ranks of the expert-parallel group         P ranks of the expert-tensor-parallel group
    N routed rows: one row is one (token, expert) pair
    Z zero-computation experts, on every rank    C = E + Z columns of the router: FFN, then zero-computation experts
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each token visits.

    Attributes:
        weights_TC: float32; the weight of each chosen expert's output, 0 where not chosen.
        map_TC: bool; True where the token visits the expert. Rows may have any number of True entries.
        scores_TC: float32; the gate's scores, which the losses read.
        logits_TC: float32; the gate's output before its nonlinearity, gating residual included.
        experts: E; the first columns are those of the FFN experts, the others those of zero-computation experts.
        cut: int64 scalar on the device; assignments to FFN experts that the rule chose and a bound took away.
        dropped: int64 scalar on the device; assignments, of all experts, that did not fit into a capacity.
    """

    weights_TC: Tensor
    map_TC: Tensor
    scores_TC: Tensor
    logits_TC: Tensor
    experts: int
    cut: Tensor
    dropped: Tensor

    @property
    def weights_TE(self) -> Tensor:
        """The weights of FFN experts, a view."""
        return self.weights_TC[:, : self.experts]

    @property
    def map_TE(self) -> Tensor:
        """The choice of FFN experts, a view."""
        return self.map_TC[:, : self.experts]

    @property
    def weights_TZ(self) -> Tensor:
        """The weights of zero-computation experts, a view."""
        return self.weights_TC[:, self.experts :]

    @property
    def map_TZ(self) -> Tensor:
        """The choice of zero-computation experts, a view."""
        return self.map_TC[:, self.experts :]

    def select(self, valid_T: Tensor) -> Routing:
        """The same, but tokens that ``valid_T`` (bool) does not name choose nobody and add 0 to every loss.

        They stay where they are: to take them out the host would have to wait for their number.
        """
        out_T1 = ~valid_T.unsqueeze(-1)
        nothing_C = torch.full_like(self.logits_TC[:1], -torch.inf)  # whose logsumexp is 0 with a 0 among them
        nothing_C[:, 0] = 0
        fields = {n: getattr(self, n).masked_fill(out_T1, 0) for n in ("weights_TC", "map_TC", "scores_TC")}
        return replace(self, logits_TC=torch.where(out_T1, nothing_C, self.logits_TC), **fields)
