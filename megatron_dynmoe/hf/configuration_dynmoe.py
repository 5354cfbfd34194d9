"""Configuration of the Hugging Face DynMoE model.

This file, `router_dynmoe.py`, `free_experts_dynmoe.py` and `modeling_dynmoe.py` are copied beside exported weights with
the files of the routing code that they import, and loaded from there with `trust_remote_code`. So all of them import
nothing but torch and transformers (5.x) and, in lines that `code.py` rewrites, the routing code.
"""

# ruff: noqa: RUF012  (transformers reads these class attributes as they are)

from dataclasses import Field
from importlib import import_module

from transformers import GenerationConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from megatron_dynmoe import routers  # noqa: F401  (registers the methods; beside weights: those of the model)
from megatron_dynmoe.ranges import Range
from megatron_dynmoe.routers.registry import GATES, RULES
from megatron_dynmoe.routers.router_config import RouterConfig, exported_fields


class DynMoEHFConfig(LlamaConfig):
    """A LLaMA decoder in which some layers hold a mixture of experts with a variable number of experts per token.

    LLaMA's own fields (`hidden_size`, `num_key_value_heads`, `rope_parameters`, `tie_word_embeddings`, ...) keep their
    meaning; `intermediate_size` is the width of the dense layers. The fields of the mixture:

    - `moe_layers`: one 0 or 1 per layer, 1 where the feed-forward network is a mixture (None: every layer).
    - `num_experts`, `moe_intermediate_size`: experts per mixture and their width.
    - `router_gate` and `router_rule`: how scores are made, and which experts a token visits; the methods that there are
      are files beside this one. Each brings its own fields: of rule "top-p" `top_p_threshold`, of "top-k"
      `num_experts_per_tok`, of gate "cosine" `cosine_scale` and `trained_cosine_scale`.
    - `moved_settings`: of settings that training moved, by name, one number per layer (None in dense layers); these are
      read in the place of the fields of those names, which hold what training started from.
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
    has_no_defaults_at_init = True  # the default's methods need not be beside these weights
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
    router_rule: str = "top-p"
    moved_settings: dict[str, list[float | None]] | None = None
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
        own = {name: kwargs.pop(name, field.default) for name, field in self.method_fields().items()}
        super().__post_init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        self.validate_architecture()

    def method_fields(self) -> dict[str, Field]:
        """What the chosen gate and rule are set by, by the names of this configuration.

        Raises ValueError for a gate or rule that there is not, and for a name that transformers uses for something
        else, and would drop.
        """
        self._check("router_gate", self.router_gate in GATES, f"one of {', '.join(GATES)}")
        self._check("router_rule", self.router_rule in RULES, f"one of {', '.join(RULES)}")
        found = exported_fields(GATES[self.router_gate], RULES[self.router_rule])
        taken = {*dir(type(self)), *type(self).__dataclass_fields__, *GenerationConfig._get_default_generation_params()}
        for name in found:
            if name in taken:
                raise ValueError(f"the setting {name!r} has a name that transformers uses; give it exported='...'.")
        return found

    def router_config(self, layer=None) -> RouterConfig:
        """What the router of a layer, counted from 0, routes by; `None`: as training started."""
        found = exported_fields(GATES[self.router_gate], RULES[self.router_rule], own=True)
        values = {field.name: getattr(self, name) for name, field in found.items()}
        moved = {} if layer is None else {n: row[layer] for n, row in (self.moved_settings or {}).items()}
        return RouterConfig(**values).moved({found[name].name: value for name, value in moved.items()})

    def validate_architecture(self):
        """Replaces LLaMA's check: `head_dim` may be independent of `hidden_size` here, and the mixture has its own."""
        layers, experts = self.moe_layers or [], self.experts_by_layer
        self._check(
            "num_key_value_heads",
            self.num_attention_heads % self.num_key_value_heads == 0,
            "a divisor of num_attention_heads",
        )
        self._check("head_dim", self.head_dim % 2 == 0, "an even number")
        sparse = len(layers) == self.num_hidden_layers and set(layers) <= {0, 1}
        self._check("moe_layers", sparse, f"a list of {self.num_hidden_layers} zeros and ones")
        self._check("num_experts", self.num_experts >= 1, "at least 1")
        fits = experts is None or [n > 0 for n in experts] == [bool(is_moe) for is_moe in layers]
        self._check("experts_by_layer", fits, "None or a number for each layer, 0 for the dense ones")
        fits = experts is None or not self.gating_residual
        self._check("gating_residual", fits, "False where experts_by_layer is set")
        fits = not self.residual_mixture or self.shared_expert_intermediate_size > 0
        self._check("residual_mixture", fits, "False without a shared expert")
        self._check_routing()

    def _check_routing(self):
        """The fields of the router, each by what its setting accepts, and what they must be together."""
        gate, rule = GATES[self.router_gate], RULES[self.router_rule]
        fields = exported_fields(gate, rule, own=True)
        for name, field in fields.items():
            accepts = field.metadata.get("accepts")
            if isinstance(accepts, Range):
                self._check(name, accepts.accepts(getattr(self, name)), str(accepts))
        fits = not rule.gates or self.router_gate in rule.gates
        self._check("router_rule", fits, f"another with router_gate {self.router_gate!r}")
        weighted = self.zero_experts > 0 and gate.probabilities
        wanted = f"False without zero experts, or with router_gate {self.router_gate!r}"
        self._check("drop_zero_weight", weighted or not self.drop_zero_weight, wanted)
        numbers = (int, float)
        fits = all(
            name in fields
            and len(row) == self.num_hidden_layers
            and all(isinstance(x, numbers) for x, is_moe in zip(row, self.moe_layers, strict=True) if is_moe)
            for name, row in (self.moved_settings or {}).items()
        )
        wanted = f"None, or by the name of a setting of the router {self.num_hidden_layers} numbers, one for each layer"
        self._check("moved_settings", fits, wanted)
        self.router_config()  # what methods check themselves

    def _check(self, name, valid, accepted):
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {accepted}.")

    @property
    def zero_computation_experts(self):
        """Columns of a router beside those of the feed-forward experts: constant, copy, zero."""
        return self.constant_experts + self.copy_experts + self.zero_experts

    def save_pretrained(self, save_directory, **kwargs):
        """As transformers does, with the routing code where it copies code."""
        super().save_pretrained(save_directory, **kwargs)
        if self._auto_class is not None:
            save_code(self, save_directory)


def save_code(config, folder):
    """In the library these files import it, so transformers' copies would; beside weights there is nothing to do."""
    if __name__.startswith("megatron_dynmoe."):
        import_module("megatron_dynmoe.hf.code").write_code(config.router_gate, config.router_rule, folder)


__all__ = ["DynMoEHFConfig"]
