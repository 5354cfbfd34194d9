"""What megatron-core asks of ``deep_ep``, in plain torch over the group's own backend; the real one is CUDA kernels.

Shapes, dtypes and meanings are those of deepseek-ai/DeepEP:
    Buffer          deep_ep/buffers/legacy.py (docstrings), csrc/kernels/intranode.cu. A token crosses to a rank once.
                    What arrives is ordered by source rank, then token. ``recv_topk_idx`` [N, K] int64 is the expert's
                    number on this rank, -1 for a choice that lies elsewhere or is none; its weight is then 0. A sum of
                    ``combine`` is float32 and rounded once; a token that went nowhere gets 0 (``values = {0}``).
    HybridEPBuffer  branch hybrid-ep, deep_ep/hybrid_ep_buffer.py, csrc/hybrid_ep. Rows are ordered by local expert,
                    then source rank and token; each expert's are filled up to ``pad_multiple``. Sums as above. Tensors
                    are read by their address, so they must be contiguous, and every rank must have as many tokens.
What the real ones assert is asserted here.  ``PAYLOADS`` is wider than theirs, so that float32 can show equality.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PAYLOADS = {torch.bfloat16, torch.float32}
TUNED = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


class EventHandle:
    """A CUDA event."""


class EventOverlap:
    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _sum(rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    return torch.zeros(count, rows.shape[1]).index_add_(0, tokens, rows.float()).to(rows.dtype)


def _check(x: Tensor) -> None:
    assert x.dim() == 2 and x.is_contiguous() and x.dtype in PAYLOADS, (x.shape, x.stride(), x.dtype)
    assert x.shape[1] * x.element_size() % 16 == 0


class _Route:
    """Which tokens go to which ranks: [T, R] bool."""

    def __init__(self, visits_TR: Tensor, group: dist.ProcessGroup) -> None:
        self.group, self.tokens = group, len(visits_TR)
        self.token_M = visits_TR.t().nonzero()[:, 1]  # by rank, then token
        mine = visits_TR.sum(dim=0)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=group)
        self.sent, self.received = mine.tolist(), theirs.tolist()

    def out(self, x: Tensor) -> Tensor:
        return _exchange(x[self.token_M], self.sent, self.received, self.group)

    def back(self, rows: Tensor) -> Tensor:
        assert len(rows) == sum(self.received)
        return _sum(_exchange(rows, self.received, self.sent, self.group), self.token_M, self.tokens)


class Buffer:
    num_sms = 20

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in TUNED, f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == torch.int64
        assert num_experts % self.group.size() == 0
        assert bool(((topk_idx >= -1) & (topk_idx < num_experts)).all())
        places = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.int64)
        places.scatter_add_(1, topk_idx % (num_experts + 1), torch.ones_like(topk_idx))  # -1: the last column
        assert places[:, :num_experts].max() <= 1, "a token chooses an expert twice"
        map_TE = places[:, :num_experts].bool()
        visits_TR = map_TE.view(len(topk_idx), self.group.size(), -1).any(dim=-1)
        sums = [visits.sum(dim=0).int() for visits in (visits_TR, map_TE)]
        return sums[0], None, sums[1], visits_TR, EventOverlap(EventHandle() if async_finish else None)

    def dispatch(
        self,
        x: Tensor,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        _check(x)
        event = EventOverlap(EventHandle() if async_finish else None)
        if handle is not None:
            assert topk_idx is None and topk_weights is None and len(x) == handle[0].tokens
            return handle[0].out(x), None, None, None, None, event
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert topk_weights.shape == topk_idx.shape and topk_idx.shape[1] <= 32 and len(topk_idx) == len(x)
        route = _Route(is_token_in_rank, self.group)
        assert route.sent == num_tokens_per_rank.tolist()
        local = len(num_tokens_per_expert) // self.group.size()
        index = route.out(topk_idx) - self.group.rank() * local
        elsewhere = (index < 0) | (index >= local)
        index, weights = index.masked_fill(elsewhere, -1), route.out(topk_weights).masked_fill(elsewhere, 0)
        counts = [int((index == expert).sum()) for expert in range(local)]
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        return route.out(x), index, weights, counts, (route,), event

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        _check(x)
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
            weights = handle[0].back(topk_weights)
        return handle[0].back(x), weights, EventOverlap(EventHandle() if async_finish else None)


class HybridEPBuffer:
    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None,
        num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None,
    ) -> None:
        assert hidden_dim % 16 == 0 and num_local_experts * group.size() % 4 == 0, "The buffer config is not valid."
        self.group, self.experts = group, num_local_experts

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        num_of_experts_per_rank: int | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_permuted_tokens: Any = None,
        pad_multiple: int | None = None,
        handle: tuple | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Tensor, Tensor | None, None, Tensor | None, tuple]:
        _check(hidden)
        if handle is None:
            assert routing_map.dtype == torch.bool and routing_map.is_contiguous() and len(routing_map) == len(hidden)
            assert num_of_experts_per_rank == self.experts
            assert not non_blocking
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.group.size())]
            dist.all_gather(counts, torch.tensor([len(hidden)]), group=self.group)
            assert len({int(count) for count in counts}) == 1, "every rank must have the same number of tokens"
            visits_TR = routing_map.view(len(routing_map), self.group.size(), self.experts).any(dim=-1)
            route = _Route(visits_TR, self.group)
            # [N, L]: of what arrives, who visits which expert here
            first, every = self.group.rank() * self.experts, route.out(routing_map.to(torch.uint8)).bool()
            handle = (route, every[:, first : first + self.experts], routing_map.shape[1])
        route, map_NL, experts = handle
        pick = self._rows(map_NL, pad_multiple)
        rows = self._permuted(route.out(hidden), pick)
        weights = None
        if probs is not None:
            assert probs.dtype == torch.float32 and probs.is_contiguous() and probs.shape == (len(hidden), experts)
            first = self.group.rank() * self.experts
            weights = route.out(probs)[:, first : first + self.experts].t().reshape(-1)
            weights = self._permuted(weights.unsqueeze(-1), self._rows(map_NL, pad_multiple, flat=True)).squeeze(-1)
        multiple = pad_multiple or 1
        sizes = -(-map_NL.sum(dim=0) // multiple) * multiple
        return rows, weights, None, sizes.int(), handle

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: tuple,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        _check(hidden)
        route, map_NL, experts = handle
        pick = self._rows(map_NL, pad_multiple)
        assert len(hidden) == len(pick)
        combined = route.back(_sum(hidden[pick >= 0], pick[pick >= 0], len(map_NL)))
        if probs is None:
            return combined, None
        assert probs.dtype == torch.float32 and probs.is_contiguous() and probs.shape == (len(hidden),)
        flat = self._rows(map_NL, pad_multiple, flat=True)
        whole = torch.zeros(len(map_NL), experts)
        mine = torch.zeros(map_NL.numel()).index_copy_(0, flat[flat >= 0], probs[flat >= 0])
        first = self.group.rank() * self.experts
        whole[:, first : first + self.experts] = mine.view(self.experts, -1).t()
        return combined, route.back(whole)

    @staticmethod
    def _rows(map_NL: Tensor, pad_multiple: int | None, flat: bool = False) -> Tensor:
        """The arrived token (``flat``: its place in [L, N]) of each row, by expert; -1 for a row that fills up."""
        pieces = []
        for expert, visits_N in enumerate(map_NL.t()):
            tokens = visits_N.nonzero().squeeze(-1)
            padding = torch.full((-len(tokens) % (pad_multiple or 1),), -1)
            pieces += [tokens + expert * len(map_NL) if flat else tokens, padding]
        return torch.cat(pieces)

    @staticmethod
    def _permuted(rows: Tensor, pick: Tensor) -> Tensor:
        out = rows.new_zeros(len(pick), rows.shape[1])
        out[pick >= 0] = rows[pick[pick >= 0]]
        return out


def install() -> None:
    """Let megatron-core find this module as ``deep_ep``: its fused_a2a.py is loaded anew, unchanged."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer, package.utils = Buffer, HybridEPBuffer, utils
    utils.EventHandle, utils.EventOverlap = EventHandle, EventOverlap
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    from megatron_dynmoe.mcore import flex_checks

    importlib.reload(fused_a2a)
    for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms", "hybrid_ep_dispatch", "hybrid_ep_combine"):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))
    flex_checks.DTYPES = tuple(PAYLOADS)
