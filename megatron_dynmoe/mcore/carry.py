"""Logits of the gating residual from layer to layer: channels appended to the hidden tensor.

``TransformerBlock`` hands each layer's output to the next untouched, through full recompute and across pipeline stages,
so what stands beside the hidden states arrives wherever they do, and its gradient comes back: exact by construction.
The first MoE layer appends, later ones replace, dense layers pass on, the last layer of the decoder strips.  A layer of
multi-token prediction sees other tokens than the decoder's layers: it begins anew, as the first MoE layer does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_dynmoe.mcore.layer import DynMoELayer


class CarryingTransformerLayer(TransformerLayer):
    """A transformer layer with input and output [S, B, D + channels], from the first MoE layer to the last layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """megatron-core's layer on the hidden states; what is carried goes to the MoE layer, or past a dense one."""
        width = self.config.hidden_size
        carried = None
        if hidden_states.shape[-1] > width:
            hidden_states, carried = hidden_states[..., :width].contiguous(), hidden_states[..., width:]
        mixture = isinstance(self.mlp, DynMoELayer)
        if mixture:
            self.mlp.previous = carried
        hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        if mixture:
            carried, self.mlp.carried = self.mlp.carried, None
        if carried is None or self.is_mtp_layer or self.layer_number == self.config.num_layers:
            return hidden_states, context
        return torch.cat([hidden_states, carried], dim=-1), context
