"""One benchmark case: what every method is given. Shape letters as in ``megatron_dynmoe/routing.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

HISTOGRAMS = ("balanced", "skewed")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Numbers that define a case; equal on all ranks.

    Attributes:
        tokens: T, on each rank. width: D. expert_width: F. experts: E, over all ranks.
        mean_k: experts per token, averaged over the tokens of each rank.
        histogram: "balanced", every expert equally likely; "skewed", expert e (from 0) as 1 / (e + 1), so that with
            several ranks the first has most of the work.
        ep: R.
    """

    tokens: int
    width: int
    expert_width: int
    experts: int
    mean_k: float
    histogram: str
    ep: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """N: routed rows of one rank; exact, so that methods with a fixed T * k are given what they assume."""
        return round(self.tokens * self.mean_k)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tensors of one rank, read only.

    Attributes:
        x_TD: input. grad_TD: gradient of the output.
        map_TE: bool. weights_TE: float32, positive where the map is true, 0 elsewhere.
        fc1_LGD, fc2_LDF: SwiGLU experts of this rank; G is 2F, gate rows first.
        group: the R ranks. alone: a group of this rank only.
    """

    setting: Setting
    rank: int
    x_TD: Tensor
    grad_TD: Tensor
    map_TE: Tensor
    weights_TE: Tensor
    fc1_LGD: Tensor
    fc2_LDF: Tensor
    group: dist.ProcessGroup
    alone: dist.ProcessGroup

    @classmethod
    def make(cls, setting: Setting, rank: int, device: str, group: dist.ProcessGroup, alone: dist.ProcessGroup) -> Case:
        """The same numbers for the same setting and rank, whatever runs them."""
        generator = torch.Generator().manual_seed(1000 + rank)
        tokens, width, inner = setting.tokens, setting.width, setting.expert_width
        local = setting.experts // setting.ep

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, setting.dtype)

        map_TE = ragged_map(setting, generator)
        weights_TE = torch.where(map_TE, 0.1 + torch.rand(map_TE.shape, generator=generator), 0.0)
        return cls(
            setting=setting,
            rank=rank,
            x_TD=normal(tokens, width),
            grad_TD=normal(tokens, width),
            map_TE=map_TE.to(device),
            weights_TE=weights_TE.to(device),
            fc1_LGD=normal(local, 2 * inner, width, scale=width**-0.5),
            fc2_LDF=normal(local, width, inner, scale=inner**-0.5),
            group=group,
            alone=alone,
        )


def ragged_map(setting: Setting, generator: torch.Generator) -> Tensor:
    """bool [T, E] with ``setting.rows`` True entries: rows of different lengths, at least one a token.

    The number of experts of a token is 1 + Binomial(E - 1, q) with the wanted mean, then adjusted to the exact total
    at random tokens; which ones they are is drawn without replacement, with the histogram's probabilities.
    """
    tokens, experts = setting.tokens, setting.experts
    chance = (setting.mean_k - 1) / max(experts - 1, 1)
    k_T = 1 + (torch.rand(tokens, experts - 1, generator=generator) < chance).sum(dim=1)
    while missing := setting.rows - int(k_T.sum()):
        can_change = (k_T < experts if missing > 0 else k_T > 1).nonzero().view(-1)
        chosen = can_change[torch.randperm(len(can_change), generator=generator)[: abs(missing)]]
        k_T[chosen] += 1 if missing > 0 else -1
    likely_E = torch.ones(experts) if setting.histogram == "balanced" else 1 / torch.arange(1, experts + 1)
    # The order of log p + Gumbel noise is a draw without replacement (Kool et al. 2019, arXiv 1903.06059).
    uniform = torch.rand(tokens, experts, generator=generator).clamp_min(1e-20)
    order_TE = (likely_E.log() - (-uniform.log()).log()).argsort(dim=1, descending=True).argsort(dim=1)
    return order_TE < k_T.unsqueeze(1)
