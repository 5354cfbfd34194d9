"""megatron-core's six hooks, for what calls them from outside instead of a layer's forward.

That is the capture of a layer's parts as CUDA graphs (``--cuda-graph-modules moe_router``), the schedule that
interleaves two micro-batches (``--overlap-moe-expert-parallel-comm``), and whoever uses a dispatcher by itself.  They
hand tokens and weights from hook to hook; what else the later ones need is kept between them.  Two forward passes of
one layer never interleave in either: the schedule puts another micro-batch's backward between the hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import maybe_skip_or_early_return_by_cudagraph
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_dynmoe.mcore.way import Way
from megatron_dynmoe.routing import PendingPlan


class DispatcherHooks(MoETokenDispatcher):
    """The hooks of a dispatcher over the moves of :class:`~megatron_dynmoe.mcore.way.Way`."""

    # Between the hooks: the way, the map of the fused permutation, the rows' origins, what shared experts see.
    _between: tuple[Way, Tensor | None, Tensor | None, Tensor] | None = None

    def begin(self, routing_map: Tensor) -> PendingPlan:
        """Send the counts of a map on their way."""
        raise NotImplementedError

    def way(self, hidden: Tensor, counts: PendingPlan) -> Way:
        """The moves along the plan of these counts."""
        raise NotImplementedError

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor, *, shared_input: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make the plan of the map and lay the rows out for their destinations."""
        way = self.way(tokens, self.begin(routing_map))
        shared_input = tokens if shared_input is None else shared_input
        rows, weights, row_id_map = way.pack(tokens, probs, shared_input)
        self._between = way, row_id_map, None, shared_input
        return rows, weights

    @property
    def _kept(self) -> tuple[Way, Tensor | None, Tensor | None, Tensor]:
        assert self._between is not None, "dispatch_preprocess() comes first"
        return self._between

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """All-to-all of rows and weights."""
        way, *_ = self._kept
        return way.wait(way.start(hidden_states, probs))

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows by local expert, rows per expert [L], weights."""
        way, row_id_map, _, shared_input = self._kept
        rows, sizes, weights, origin_N = way.unpack(hidden_states, probs)
        self._between = way, row_id_map, origin_N, shared_input
        return rows, sizes, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs in the order of arrival."""
        way, _, origin_N, _ = self._kept
        return way.repack(hidden_states, origin_N)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The reverse all-to-all."""
        way, *_ = self._kept
        return way.cross_back(hidden_states)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum each token's rows to [S, B, D]; plus overlapped shared experts."""
        way, row_id_map, *_ = self._kept
        out = way.unpack_back(hidden_states, row_id_map)
        self._between = None  # indices are as long as the rows; the graph keeps what it needs
        return out


class LayerHooks(MoELayer):
    """The hooks of a layer over the steps of :class:`~megatron_dynmoe.mcore.layer.DynMoELayer`.

    What is computed from the layer's input and needed in :meth:`postprocess` crosses over by a :class:`Bridge`, because
    the schedule cuts the graph between the hooks and runs the parts' backward passes one by one.
    """

    _bridge: Bridge | None = None

    @maybe_skip_or_early_return_by_cudagraph("route")
    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, E] float32, with the losses attached, and map [T, E] bool."""
        routing = self.router(hidden_states, padding_mask=padding_mask)
        kept = [] if self.mixer is None else [hidden_states]
        if self.free_experts is not None:
            kept.append(self.free_experts(self.expert_input(hidden_states), routing.weights_TZ))
        self._bridge = Bridge(*kept)
        return routing.weights_TE, routing.map_TE

    @maybe_skip_or_early_return_by_cudagraph("preprocess")
    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weights in the order of their destinations."""
        overlapped = {"shared_input": hidden_states} if self.shared_expert_overlap else {}
        hidden = self.expert_input(hidden_states)
        rows, weights = self.token_dispatcher.dispatch_preprocess(hidden, routing_map, probs, **overlapped)
        return rows if self._bridge is None else self._bridge.leave(rows), weights

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Sum the routed, the zero-computation and the shared experts' outputs."""
        output = self.token_dispatcher.combine_postprocess(output)
        kept: list[Tensor] = []
        if self._bridge is not None:  # a replayed graph of the router left none
            output, *kept = self._bridge.arrive(output)
            self._bridge = None
        if self.free_experts is not None:
            output = kept.pop() + output
        return self.with_shared(output, shared_expert_output, *kept)


class Bridge:
    """Takes tensors from an early part of a pass to a late one whose graph may be cut off; gradients come back.

    The late part's backward runs first, and leaves the tensors' gradients here; the early part's takes them.

    Args:
        tensors: what crosses.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self.gradients: tuple[Tensor | None, ...] = ()

    def leave(self, last: Tensor) -> Tensor:
        """In the early part: ``last``, which the late part's output is computed from."""
        return _Leave.apply(self, last, *self.tensors) if self.tensors else last

    def arrive(self, first: Tensor) -> tuple[Tensor, ...]:
        """In the late part: ``first``, which is computed from what :meth:`leave` gave, and the tensors."""
        tensors = tuple(tensor.detach() for tensor in self.tensors)
        self.tensors = ()
        for tensor in tensors:
            if tensor.is_cuda:  # the late part may run on another stream
                tensor.record_stream(torch.cuda.current_stream())
        return _Arrive.apply(self, first, *tensors) if tensors else (first,)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bridge: Bridge, last: Tensor, *tensors: Tensor) -> Tensor:
        ctx.bridge = bridge
        return last.view_as(last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.bridge.gradients = ctx.bridge.gradients, ()
        return None, grad, *gradients


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bridge: Bridge, first: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.bridge = bridge
        return tuple(tensor.view_as(tensor) for tensor in (first, *tensors))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.bridge.gradients = gradients
        return None, grad, *(None for _ in gradients)
