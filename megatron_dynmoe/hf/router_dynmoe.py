"""The router of the Hugging Face DynMoE model: it holds the parameters, the routing is the training's own code.

Shape letters: `T` tokens of the batch, `D` hidden size, `E` feed-forward experts, `Z` zero-computation experts and
`C` = E + Z columns of the router.
The decision is made in float32 whatever the model's dtype: in bfloat16 scores near a threshold round to the other side,
and a token gets another set of experts than it was trained with.
"""

import torch
from torch import Tensor, nn

from megatron_dynmoe.routers.registry import GATES
from megatron_dynmoe.routers.route import route

from .configuration_dynmoe import DynMoEHFConfig


class CarriedLogits:
    """Router logits of one forward pass, by layer: a mixture's router reads those of the mixture before it.

    Each forward pass of the model makes one and hands it to its layers as a keyword argument. So nothing stays behind
    between passes or steps of generation, threads that share a model do not see each other's, and the hidden states
    are those of any decoder. Being a plain object it goes through hooks that move tensors between devices (which copy
    dictionaries), and keeping the logits of every layer it serves a layer that gradient checkpointing runs again.
    """

    def __init__(self):
        self.by_layer = {}

    def before(self, layer):
        """The logits [T, C] of the last mixture before `layer`, or None."""
        earlier = [index for index in self.by_layer if index < layer]
        return self.by_layer[max(earlier)] if earlier else None


class DynMoERouter(nn.Module):
    """Gate and rule by name, in float32; `weight`, and what they learn beside it under the names they give.

    With a gating residual, `gate_map` [C, C] of the previous mixture's logits is added; the first mixture has none.
    Tokens are routed as in evaluation, also by `train()`: capacities and row bounds are of the training's batches, and
    no token goes without an expert. Gradients are the training's.
    """

    def __init__(self, config: DynMoEHFConfig, experts, layer_idx=0, first=True):
        super().__init__()
        self.config = config
        self.experts = experts
        self.routing = config.router_config(layer_idx)
        self.columns = experts + config.zero_computation_experts
        shape = GATES[self.routing.gate].weight_shape or (lambda *shape: shape)
        self.weight = nn.Parameter(torch.empty(shape(self.columns, config.hidden_size)))
        self.learned = tuple(self.initial())
        for name, value in self.initial().items():
            self.register_parameter(name, nn.Parameter(torch.empty(tuple(getattr(value, "shape", value)))))
        if config.gating_residual and not first:
            self.gate_map = nn.Parameter(torch.empty(self.columns, self.columns))
            self.learned += ("gate_map",)

    def initial(self):
        """What gate and rule learn beside the weight, by name: its values at the start, or its shape."""
        found: dict = {}
        for method in self.routing.methods:
            if method.parameters is not None:
                found |= method.parameters(self.routing, self.columns, self.config.hidden_size)
        return found

    @torch.no_grad()
    def reset_parameters(self, std):
        """Draw what is not loaded: as gate and rule say, else from N(0, std)."""
        values = {name: value for name, value in self.initial().items() if isinstance(value, Tensor)}
        init_weight = GATES[self.routing.gate].init_weight
        for name, parameter in self.named_parameters():
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if name in values:
                parameter.copy_(values[name])
            elif name == "weight" and init_weight is not None:
                init_weight(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(self, x_TD, previous_TC=None):
        """Routes tokens.

        Args:
            x_TD: hidden states of any float dtype.
            previous_TC: the previous mixture's logits, for the gating residual; None in the first mixture.

        Returns:
            (logits_TC, weights_TE, map_TE, weights_TZ, map_TZ): logits with the gating residual, as the next
            mixture reads them; weights and choice of the feed-forward and of the zero-computation experts.
        """
        # Autocast would compute the product in its own dtype.
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            # The previous layer may live on another device.
            previous_TC = None if previous_TC is None else previous_TC.to(x_TD.device)
            parameters = {name: getattr(self, name) for name in self.learned}
            routing = route(
                x_TD, self.weight, self.routing, parameters=parameters, previous_TC=previous_TC, training=False
            )
        return routing.logits_TC, routing.weights_TE, routing.map_TE, routing.weights_TZ, routing.map_TZ
