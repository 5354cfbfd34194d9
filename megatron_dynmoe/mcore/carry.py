"""Logits of the gating residual from layer to layer: channels appended to the hidden tensor.

``TransformerBlock`` hands each layer's output to the next untouched, through full recompute and across pipeline stages,
so what stands beside the hidden states arrives wherever they do, and its gradient comes back: exact by construction.
The first MoE layer appends, later ones replace, dense layers pass on, the last layer of the decoder strips.  A layer of
multi-token prediction sees other tokens than the decoder's layers: it begins anew, as the first MoE layer does.

Within a layer hidden states and logits are two tensors, views of what came in; norm and residual sum take strides.  Of
T x D two tensors are copied: the output, which logits are put beside, and in the backward pass the input's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_dynmoe.mcore.channels import pack, unpack
from megatron_dynmoe.mcore.layer import DynMoELayer


class CarryingTransformerLayer(TransformerLayer):
    """A transformer layer with input and output [S, B, D + channels], from the first MoE layer to the last layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """megatron-core's layer on the hidden states; what is carried goes to the MoE layer, or past a dense one."""
        width = self.config.hidden_size
        carried = None
        if hidden_states.shape[-1] > width:
            # One split, whose gradient is one concatenation; of two slices it would be two sums over the whole width.
            hidden_states, carried = hidden_states.split([width, hidden_states.shape[-1] - width], dim=-1)
        hidden_states, context = self._forward_attention(hidden_states, *args, **kwargs)
        if isinstance(self.mlp, DynMoELayer):
            hidden_states, carried = self._forward_mixture(hidden_states, carried, kwargs.get("padding_mask"))
        else:
            others = {name: kwargs.get(name) for name in ("inference_context", "padding_mask", "packed_seq_params")}
            hidden_states = self._forward_mlp(hidden_states, **others)
        if carried is None or self.is_mtp_layer or self.layer_number == self.config.num_layers:
            return hidden_states, context
        return torch.cat([hidden_states, carried], dim=-1), context

    def _forward_mixture(
        self, hidden_states: Tensor, carried: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """megatron-core's ``_forward_mlp`` with logits beside, without what a gating residual refuses (chunks, graphs)
        and without its order of packed sequences, which per-sequence losses want and logits would have to follow.
        """
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        normed, residual = normed if isinstance(normed, tuple) else (normed, hidden_states)
        previous = self.mlp.router.no_logits(normed) if carried is None else unpack(carried)
        output, bias, logits = self.mlp(normed, padding_mask=padding_mask, previous=previous)
        return self._forward_post_mlp((output, bias), residual), pack(logits, output.dtype)
