"""Configuration of the Hugging Face DynMoE model.

This file, `router_dynmoe.py`, `free_experts_dynmoe.py` and `modeling_dynmoe.py` are copied beside exported weights and
loaded from there with `trust_remote_code`, so they import nothing but torch and transformers (5.x).
"""

# ruff: noqa: RUF012  (transformers reads these class attributes as they are)

from transformers.models.llama.configuration_llama import LlamaConfig

ROUTER_RULES = ("top-p", "top-k", "top-any")
ROUTER_GATES = ("softmax", "tanh", "cosine")


class DynMoEHFConfig(LlamaConfig):
    """A LLaMA decoder in which some layers hold a mixture of experts with a variable number of experts per token.

    LLaMA's own fields (`hidden_size`, `num_key_value_heads`, `rope_parameters`, `tie_word_embeddings`, ...) keep their
    meaning; `intermediate_size` is the width of the dense layers. The fields of the mixture:

    - `moe_layers`: one 0 or 1 per layer, 1 where the feed-forward network is a mixture (None: every layer).
    - `num_experts`, `moe_intermediate_size`: experts per mixture and their width.
    - `router_rule`: "top-p" keeps the most probable experts while the probability *before* an expert is at most
      `top_p_threshold` (in [0, 1]; 0 keeps one expert, 1 keeps all); "top-k" keeps `num_experts_per_tok`; "top-any"
      keeps all whose score exceeds their own learned threshold, or the best one, each with weight 1/k.
    - `router_gate`: "softmax" of linear logits, or of those of two layers with "tanh" between; or "cosine": the sigmoid
      of `cosine_scale` times the cosine with each expert's embedding, where `trained_cosine_scale` says that the scale
      is a weight of each router.
    - `constant_experts`, `copy_experts`, `zero_experts`: zero-computation experts of each mixture (MoE++) that stand
      beside its `num_experts` feed-forward ones; rule and cap choose among all of them.
    - `gating_residual`: whether a learned map of the previous mixture's logits is added to a router's logits, and
      `logits_norm_std`: the standard deviation that a token's logits are brought to before scoring (None: as they are).
    - `drop_zero_weight`: zero experts get no weight, and the weights of a token's other experts sum to one.
    - `expert_input_scale`: factor on the input of all these experts, not on that of the router or a shared expert.
    - `experts_by_layer`: experts of each layer where they differ (None: `num_experts` everywhere), and `expert_slots`:
      for each of them the slot it had in training, where the number of experts adapted.
    - `max_experts_per_token`: keeps at most that many of the chosen, the most probable ones (None: no cap).
    - `normalize_router_weights`: whether the weights of the kept experts are divided by their sum.
    - `shared_expert_intermediate_size`: width of an expert that every token passes (0: none), and `shared_expert_gate`:
      whether its output is scaled by a learned sigmoid per token; `residual_mixture`: whether it is mixed with the
      routed experts by a learned softmax over the two instead of being added.

    Raises ValueError, naming the field, for a value that no model can have.
    """

    model_type = "dynmoe"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    moe_layers: list[int] | None = None
    num_experts: int = 16
    moe_intermediate_size: int | None = None
    experts_by_layer: list[int] | None = None
    expert_slots: list[list[int]] | None = None
    router_gate: str = "softmax"
    cosine_scale: float = 1.0
    trained_cosine_scale: bool = False
    router_rule: str = "top-p"
    top_p_threshold: float = 0.4
    num_experts_per_tok: int = 2
    max_experts_per_token: int | None = None
    normalize_router_weights: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    residual_mixture: bool = False
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    gating_residual: bool = False
    logits_norm_std: float | None = None
    drop_zero_weight: bool = False
    expert_input_scale: float = 1.0

    def __post_init__(self, **kwargs):
        if self.moe_layers is None:
            self.moe_layers = [1] * self.num_hidden_layers
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self):
        """Replaces LLaMA's check: `head_dim` may be independent of `hidden_size` here, and the mixture has its own."""
        layers = self.moe_layers or []
        checks = [
            (
                "num_key_value_heads",
                self.num_attention_heads % self.num_key_value_heads == 0,
                "a divisor of num_attention_heads",
            ),
            ("head_dim", self.head_dim % 2 == 0, "an even number"),
            (
                "moe_layers",
                len(layers) == self.num_hidden_layers and set(layers) <= {0, 1},
                f"a list of {self.num_hidden_layers} zeros and ones",
            ),
            ("num_experts", self.num_experts >= 1, "at least 1"),
            ("router_gate", self.router_gate in ROUTER_GATES, f"one of {', '.join(ROUTER_GATES)}"),
            ("router_rule", self.router_rule in ROUTER_RULES, f"one of {', '.join(ROUTER_RULES)}"),
            ("router_rule", self.router_rule != "top-any" or self.router_gate == "cosine", "another with this gate"),
            (
                "experts_by_layer",
                self.experts_by_layer is None
                or [n > 0 for n in self.experts_by_layer] == [bool(is_moe) for is_moe in layers],
                "None or a number for each layer, 0 for the dense ones",
            ),
            (
                "residual_mixture",
                not self.residual_mixture or self.shared_expert_intermediate_size > 0,
                "False without a shared expert",
            ),
            ("top_p_threshold", 0.0 <= self.top_p_threshold <= 1.0, "in [0, 1]"),
            ("num_experts_per_tok", self.num_experts_per_tok >= 1, "at least 1"),
            (
                "max_experts_per_token",
                self.max_experts_per_token is None or self.max_experts_per_token >= 1,
                "None or at least 1",
            ),
            *self._zero_computation_checks(),
        ]
        for field, valid, accepted in checks:
            if not valid:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be {accepted}.")

    @property
    def zero_computation_experts(self):
        """Columns of a router beside those of the feed-forward experts: constant, copy, zero."""
        return self.constant_experts + self.copy_experts + self.zero_experts

    def _zero_computation_checks(self):
        """(field, whether it is valid, what would be) of what MoE++ adds."""
        counts = [
            (name, getattr(self, name) >= 0, "at least 0")
            for name in ("zero_experts", "copy_experts", "constant_experts")
        ]
        std, dropped = self.logits_norm_std, self.drop_zero_weight
        weighted = self.zero_experts > 0 and self.router_gate != "cosine"
        alike = self.experts_by_layer is None
        return [
            *counts,
            ("logits_norm_std", std is None or std > 0, "None or above 0"),
            ("drop_zero_weight", weighted or not dropped, "False without zero experts, or with gate 'cosine'"),
            ("expert_input_scale", self.expert_input_scale > 0, "above 0"),
            ("gating_residual", alike or not self.gating_residual, "False where experts_by_layer is set"),
        ]


__all__ = ["DynMoEHFConfig"]
