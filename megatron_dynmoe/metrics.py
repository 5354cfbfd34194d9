"""What a researcher watches: experts per token, balance, and rows that were real.

Counts are integers, kept on the device and summed over ranks once an interval; nothing here waits for the device
before that.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megatron_dynmoe.routers.routing import Routing


@dataclass(frozen=True)
class Traffic:
    """What dispatches put on the wire; numbers that are known on the device alone stay there until they are summed.

    Attributes:
        rows: rows handed to the all-to-all, those that stay on the rank included.
        crossing_rows: rows that leave the rank.
        crossing_bytes: bytes that leave the rank, rows out and back and the weights that go with them.
    """

    rows: int | Tensor = 0
    crossing_rows: int | Tensor = 0
    crossing_bytes: int | Tensor = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.rows + other.rows,
            self.crossing_rows + other.crossing_rows,
            self.crossing_bytes + other.crossing_bytes,
        )


@dataclass(frozen=True)
class RoutingSummary:
    """What was routed in one interval, over all ranks.

    Attributes:
        experts_per_token: mean over tokens and MoE layers.
        experts_per_token_p99: 99th percentile over tokens and MoE layers.
        experts_per_token_by_layer: mean, by layer index (from 0); MoE layers only.
        load_imbalance: rows of the busiest expert over the mean of all experts, averaged over MoE layers.
        routed_rows: (token, expert) pairs, all layers and ranks.
        tokens: tokens seen by one MoE layer.
        cut_rows: assignments that the rule chose and a bound took away, all layers and ranks.
        unrouted: share of tokens that visit no FFN expert, mean over MoE layers.
        unrouted_by_layer: the same by layer index.
        dropped: assignments that did not fit into a capacity, all layers and ranks.
        kinds_by_layer: by layer index and kind of zero-computation expert, the share of tokens that choose it.
        traffic: of all layers and ranks; with the alltoall and flex dispatchers.
    """

    experts_per_token: float
    experts_per_token_p99: int
    experts_per_token_by_layer: dict[int, float]
    load_imbalance: float
    routed_rows: int
    tokens: int
    cut_rows: int = 0
    unrouted: float = 0.0
    unrouted_by_layer: dict[int, float] = field(default_factory=dict)
    dropped: int = 0
    kinds_by_layer: dict[int, dict[str, float]] = field(default_factory=dict)
    traffic: Traffic = Traffic()

    def scalars(self) -> dict[str, float]:
        """The values that are logged under their own names."""
        return {
            "experts_per_token": self.experts_per_token,
            "experts_per_token_p99": float(self.experts_per_token_p99),
            "load_imbalance": self.load_imbalance,
            "unrouted_tokens": self.unrouted,
        } | {
            f"{kind}_tokens": sum(shares[kind] for shares in self.kinds_by_layer.values()) / len(self.kinds_by_layer)
            for kind in next(iter(self.kinds_by_layer.values()), {})
        }


class RoutingStats:
    """Adds up routing maps: rows per expert, and how many tokens visited 0, 1, 2, ... experts, for each layer.

    Args:
        num_layers, num_experts: of the model.
        kinds: zero-computation experts by kind, in the order of their columns.
    """

    def __init__(self, num_layers: int, num_experts: int, kinds: dict[str, int] | None = None) -> None:
        self.num_experts = num_experts
        self.kinds = {kind: count for kind, count in (kinds or {}).items() if count > 0}
        # Columns: E rows per expert, E + 1 of the histogram, tokens by kind of zero-computation expert, rows dropped,
        # rows cut; one tensor, so that one all-reduce sums it.
        self.counts = torch.zeros(num_layers, 2 * num_experts + 1 + len(self.kinds) + 2, dtype=torch.int64)
        self.traffic = Traffic()

    def add(self, layer: int, routing: Routing, valid_T: Tensor | None = None) -> None:
        """Count one routing at layer ``layer``; of its tokens those that ``valid_T`` (bool) names, or all."""
        map_TE, map_TZ = routing.map_TE, routing.map_TZ
        if valid_T is not None:
            map_TE, map_TZ = map_TE & valid_T.unsqueeze(-1), map_TZ & valid_T.unsqueeze(-1)
        if self.counts.device != map_TE.device:
            self.counts = self.counts.to(map_TE.device)
        with torch.no_grad():
            row = self.counts[layer]
            row[: self.num_experts] += map_TE.sum(dim=0)
            experts_T = map_TE.sum(dim=1) + self.num_experts
            row.index_add_(0, experts_T, torch.ones_like(experts_T) if valid_T is None else valid_T.long())
            for place, columns in enumerate(map_TZ.split(list(self.kinds.values()), dim=1) if self.kinds else ()):
                row[2 * self.num_experts + 1 + place] += columns.any(dim=1).sum()
            row[-2] += routing.dropped
            row[-1] += routing.cut

    def reduce(self, *, divide_by: int = 1) -> RoutingSummary:
        """Sum over all ranks, summarise, and start again from zero.

        Args:
            divide_by: ranks that counted the same tokens.
        """
        traffic = torch.tensor(astuple(self.traffic), device=self.counts.device)
        counts = torch.cat([self.counts.flatten(), traffic])
        shape = self.counts.shape
        self.counts.zero_()
        self.traffic = Traffic()
        if dist.is_available() and dist.is_initialized():
            if dist.get_backend() == "nccl" and counts.device.type == "cpu":  # a pipeline stage without MoE layers
                counts = counts.cuda()
            dist.all_reduce(counts)
        counts = counts.cpu() // divide_by
        sent = Traffic(*counts[-3:].tolist())
        return replace(summarize(counts[:-3].view(shape), self.num_experts, list(self.kinds)), traffic=sent)


def summarize(counts: Tensor, num_experts: int, kinds: list[str]) -> RoutingSummary:
    """Counts, as :class:`RoutingStats` has them, to a summary; layers without tokens are dense and left out."""
    rows, histogram = counts[:, :num_experts], counts[:, num_experts : 2 * num_experts + 1]
    chosen = counts[:, 2 * num_experts + 1 : -2]
    tokens = histogram.sum(dim=1)
    moe = [layer for layer in range(len(counts)) if tokens[layer] > 0]
    if not moe:
        return RoutingSummary(0.0, 0, {}, 0.0, 0, 0)
    by_layer = {layer: rows[layer].sum().item() / tokens[layer].item() for layer in moe}
    imbalance = [rows[layer].max().item() * num_experts / max(rows[layer].sum().item(), 1) for layer in moe]
    unrouted = {layer: histogram[layer, 0].item() / tokens[layer].item() for layer in moe}
    cumulative = histogram.sum(dim=0).cumsum(0)
    p99 = int(torch.searchsorted(cumulative, -(-cumulative[-1] * 99 // 100)))
    return RoutingSummary(
        experts_per_token=rows.sum().item() / tokens.sum().item(),
        experts_per_token_p99=p99,
        experts_per_token_by_layer=by_layer,
        load_imbalance=sum(imbalance) / len(moe),
        routed_rows=int(rows.sum()),
        tokens=int(tokens[moe[0]]),
        cut_rows=int(counts[:, -1].sum()),
        unrouted=sum(unrouted.values()) / len(moe),
        unrouted_by_layer=unrouted,
        dropped=int(counts[:, -2].sum()),
        kinds_by_layer={layer: dict(zip(kinds, (chosen[layer] / tokens[layer]).tolist(), strict=True)) for layer in moe}
        if kinds
        else {},
    )
