"""Hugging Face model of a LLaMA decoder with a variable number of experts per token.

Attention, rotary embedding, norms, masks and caches are those of transformers' own LLaMA; this file adds the experts,
`free_experts_dynmoe.py` those of them that compute next to nothing, `router_dynmoe.py` the router. Shape letters: `T`
tokens of the batch, `D` hidden size, `E` experts, `N` routed (token, expert) pairs, `Z` zero-computation experts.
"""

# ruff: noqa: RUF012  (transformers reads these class attributes as they are)

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_dynmoe import DynMoEHFConfig, save_code
from .free_experts_dynmoe import DynMoEFreeExperts
from .router_dynmoe import CarriedLogits, DynMoERouter


class DynMoEMLP(nn.Module):
    """SwiGLU feed-forward network of a given width: a dense layer, one expert or the shared expert."""

    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DynMoESparseMLP(nn.Module):
    """Mixture of experts: sum over the chosen experts of weight times expert output, plus the shared expert.

    Chosen experts are feed-forward or, where the configuration has them, zero-computation ones (`free_experts`). With
    `residual_mixture` the two parts are not added but mixed, by a softmax over two numbers that are linear in the
    token. Hidden states of any leading shape [..., D] come out in the same shape and dtype; the sum is accumulated in
    float32.
    """

    def __init__(self, config, experts=None, layer_idx=0):
        super().__init__()
        experts = config.num_experts if experts is None else experts
        self.layer_idx = layer_idx
        self.input_scale = config.expert_input_scale
        self.router = DynMoERouter(config, experts, layer_idx, first=not any(config.moe_layers[:layer_idx]))
        self.free_experts = DynMoEFreeExperts(config) if config.zero_computation_experts else None
        self.experts = nn.ModuleList(DynMoEMLP(config, config.moe_intermediate_size) for _ in range(experts))
        width = config.shared_expert_intermediate_size
        gated = width and config.shared_expert_gate
        self.shared_expert = DynMoEMLP(config, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None
        self.mixer = nn.Linear(config.hidden_size, 2) if config.residual_mixture else None

    def forward(self, hidden_states, carried=None):
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        previous_TC = carried.before(self.layer_idx) if carried is not None else None
        logits_TC, weights_TE, map_TE, weights_TZ, _ = self.router(x_TD, previous_TC)
        if carried is not None:
            carried.by_layer[self.layer_idx] = logits_TC
        scaled_TD = x_TD if self.input_scale == 1 else x_TD * self.input_scale
        out_TD = self.routed(scaled_TD, weights_TE, map_TE)
        if self.free_experts is not None:
            out_TD = out_TD + self.free_experts(scaled_TD, weights_TZ)
        out_TD = out_TD.to(x_TD.dtype)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
            out_TD = out_TD + shared_TD if self.mixer is None else self.mix(x_TD, out_TD, shared_TD)
        return out_TD.view_as(hidden_states)

    def mix(self, x_TD, routed_TD, shared_TD):
        """The convex combination of the two parts; its coefficients are float32."""
        mixer = self.mixer
        logits_T2 = F.linear(x_TD.float(), mixer.weight.float(), mixer.bias.float())  # type: ignore[union-attr]
        c_T2 = logits_T2.softmax(dim=-1).to(x_TD.dtype)
        return c_T2[:, :1] * routed_TD + c_T2[:, 1:] * shared_TD

    def routed(self, x_TD, weights_TE, map_TE):
        """The routed experts' weighted sum [T, D] in float32; each expert runs once, on exactly its tokens."""
        # Sorted by expert, so that one synchronisation with the device gives every expert its rows.
        expert_N, token_N = map_TE.T.nonzero(as_tuple=True)
        weight_N = weights_TE[token_N, expert_N].unsqueeze(-1)
        counts_E = map_TE.sum(dim=0).tolist()
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, token, weight in zip(self.experts, token_N.split(counts_E), weight_N.split(counts_E), strict=True):
            if len(token):
                out_TD.index_add_(0, token, weight * expert(x_TD[token]).float())
        return out_TD


class DynMoEDecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer with a mixture of experts where `config.moe_layers` says so."""

    def __init__(self, config, layer_idx):
        nn.Module.__init__(self)  # LLaMA's constructor would build a dense network for every layer
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        sparse = config.moe_layers[layer_idx]
        if sparse:
            experts = config.experts_by_layer[layer_idx] if config.experts_by_layer else config.num_experts
            self.mlp = DynMoESparseMLP(config, experts, layer_idx)
        else:
            self.mlp = DynMoEMLP(config, config.intermediate_size)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, carried=None, **kwargs):
        """LLaMA's forward, inherited but where a mixture must be handed the `CarriedLogits`."""
        if carried is None or not isinstance(self.mlp, DynMoESparseMLP):
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), carried)


class DynMoEPreTrainedModel(LlamaPreTrainedModel):
    """Weight initialisation, precision and recordable outputs of the family."""

    config_class = DynMoEHFConfig
    _no_split_modules = ["DynMoEDecoderLayer"]
    _keep_in_fp32_modules_strict = {"router"}
    # The number of rows of an expert depends on the data.
    _can_compile_fullgraph = False
    _can_record_outputs = {
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(DynMoERouter, index=0),
        "routing_map": OutputRecorder(DynMoERouter, index=2),
        "free_routing_map": OutputRecorder(DynMoERouter, index=4),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DynMoERouter):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, DynMoEFreeExperts):
            for name, parameter in module.named_parameters():
                if not getattr(parameter, "_is_hf_initialized", False):
                    # A constant expert's vector is drawn from N(0, 1), as in the public code of MoE++.
                    nn.init.normal_(parameter, std=1.0 if name == "values" else self.config.initializer_range)

    def save_pretrained(self, save_directory, **kwargs):
        """As transformers does, with the routing code where it copies code."""
        super().save_pretrained(save_directory, **kwargs)
        if self._auto_class is not None:
            save_code(self.config, save_directory)


class DynMoEModel(DynMoEPreTrainedModel, LlamaModel):
    """The decoder without the language-model head; cache and masks are LLaMA's."""

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DynMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *args, **kwargs):
        """LLaMA's forward; with a gating residual its layers get something to carry the routers' logits in."""
        if self.config.gating_residual:
            kwargs["carried"] = CarriedLogits()
        return super().forward(*args, **kwargs)


@dataclass
class DynMoECausalLMOutputWithPast(CausalLMOutputWithPast):
    """Adds what routers did, on request and for each mixture layer.

    `router_logits` [T, C] float32, of all experts; `routing_map` [T, E] bool, of the feed-forward ones: a row summed is
    a token's number of them, a column summed an expert's number of tokens; `free_routing_map` [T, Z] bool, of the
    zero-computation ones in the order constant, copy, zero.
    """

    router_logits: tuple | None = None
    routing_map: tuple | None = None
    free_routing_map: tuple | None = None


class DynMoEForCausalLM(DynMoEPreTrainedModel, LlamaForCausalLM):
    """The decoder with its language-model head; `generate` comes from transformers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DynMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [B, S, V], and the loss of `labels` [B, S] (next token, -100 ignored).

        `output_router_logits=True`, `output_routing_map=True` and `output_free_routing_map=True` return what
        `DynMoECausalLMOutputWithPast` names; `logits_to_keep` as in LLaMA: the number of last positions to compute
        logits for (0: all), or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return DynMoECausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
            routing_map=outputs.get("routing_map"),
            free_routing_map=outputs.get("free_routing_map"),
        )


__all__ = ["DynMoEForCausalLM", "DynMoEModel", "DynMoEPreTrainedModel"]
