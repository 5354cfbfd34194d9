"""What of Megatron's configuration a dynamic MoE layer accepts, checked when the layer is built.

Every refusal names the field, its value, why it cannot work and what to set instead.
"""

from __future__ import annotations

from dataclasses import fields

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmoe.checks import check_division, refuse
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.flex_checks import check_flex
from megatron_dynmoe.mcore.fp8_checks import check_fp8
from megatron_dynmoe.routers.router_config import all_fields

# Megatron options whose stock implementation chooses experts itself: with another router they would be ignored.
_CHOOSES_EXPERTS = {
    "moe_router_score_function": ("softmax", "choose the gate with --moe-gate"),
    "moe_router_num_groups": (None, "group-limited routing assumes a fixed k"),
    "moe_router_enable_expert_bias": (False, "its target is k * T / E rows an expert, which assumes a fixed k"),
    "moe_router_topk_scaling_factor": (None, "scale the weights in a rule of your own instead"),
    "moe_router_fusion": (False, "the fused kernel computes top-k"),
    "moe_enable_routing_replay": (False, "replay records k experts a token"),
    "moe_router_force_load_balancing": (False, "it replaces the router"),
    "moe_router_force_biased": (None, "it replaces the router"),
    "moe_apply_probs_on_input": (False, "a token's experts have different weights"),
    "moe_latent_size": (None, "it is not supported by dynamic layers yet"),
}


def check_config(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    """Refuse what cannot work with ragged routing.

    Raises:
        ConfigError: with the field, the value, the reason and the alternative.
    """
    experts, ranks = config.num_moe_experts, config.expert_model_parallel_size
    if not experts:
        refuse("num_experts", experts, "a dynamic MoE layer needs experts", "set --num-experts to at least 1")
    check_division(experts, ranks)
    dynmoe.check_columns(experts)
    _check_adaptation(config, dynmoe)
    _check_shared_expert(config, dynmoe)
    _check_local(config, dynmoe)
    if dynmoe.gating_residual:
        _check_carry(config)
    check_balancing(config.moe_router_load_balancing_type)
    _check_shared_fields(config, dynmoe)
    for name, (accepted, reason) in _CHOOSES_EXPERTS.items():
        value = getattr(config, name)
        if value != accepted:
            refuse(name, value, reason, f"leave it at {accepted!r}")
    _check_experts(config)
    check_fp8(config, dynmoe)
    _check_dispatcher(config)
    check_flex(config, dynmoe)
    _check_capture(config, dynmoe)


def balances(config: TransformerConfig) -> bool:
    """Whether the load-balance loss is to be computed: not with the balancing type "none"."""
    return config.moe_router_load_balancing_type not in ("none", ["none"])


def check_balancing(kind: str | list[str]) -> None:
    """Refuse kinds of load balancing that are not ours; a list of one kind is that kind.

    Raises:
        ConfigError: anything but "aux_loss" and "none".
    """
    if kind not in ("aux_loss", "none", ["aux_loss"], ["none"]):
        reason = "the stock balancing losses rebuild a top-k map (moe_utils.py:946)"
        refuse("moe_router_load_balancing_type", kind, reason, "use 'aux_loss' (our load-balance loss) or 'none'")


def _check_experts(config: TransformerConfig) -> None:
    if config.add_bias_linear:
        reason = "the router has no bias, and with weighted rows megatron-core's sequential experts raise in training"
        refuse("disable_bias_linear", False, reason, "set --disable-bias-linear")
    if config.moe_router_dtype not in (None, "fp32"):
        reason = "gates and rules compute in float32, whatever the model's dtype"
        refuse("moe_router_dtype", config.moe_router_dtype, reason, "use fp32, or leave it unset")


def _check_adaptation(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    if not dynmoe.adaptive_experts or dynmoe.added_expert_init == "keep":
        return
    for name in ("fp8_param", "fp4_param"):
        if getattr(config, name):
            reason = f"--moe-added-expert-init {dynmoe.added_expert_init} writes weights, not their quantised form"
            refuse(f"{name}_gather", True, reason, "leave it off, or set --moe-added-expert-init keep")


def _check_shared_expert(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    overlap = config.moe_shared_expert_overlap
    if overlap and (config.glu_linear_offset or config.activation_func_clamp_value is not None):
        reason = "its own activation knows neither --glu-linear-offset nor a clamp (shared_experts.py:293)"
        refuse("moe_shared_expert_overlap", True, reason, "leave it off with either")
    if not dynmoe.residual:
        return
    if not config.moe_shared_expert_intermediate_size:
        reason, instead = "there is no dense expert to mix with", "set --moe-shared-expert-intermediate-size"
        refuse("moe_residual", True, reason, instead)
    if config.moe_shared_expert_overlap:
        reason = "the overlapped shared expert is added to the routed ones before they can be mixed"
        refuse("moe_shared_expert_overlap", True, reason, "leave it off with --moe-residual")


def _check_local(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    local = {"moe_residual": dynmoe.residual, "moe_zero_experts": bool(dynmoe.zero_computation_experts)}
    local |= {"moe_gating_residual": dynmoe.gating_residual}
    if config.overlap_moe_expert_parallel_comm:
        for name, wanted in local.items():
            if wanted:
                reason = "a layer that computes two micro-batches at once would mix up what it keeps between its parts"
                refuse(name, True, reason, "leave --overlap-moe-expert-parallel-comm off")


def _check_carry(config: TransformerConfig) -> None:
    """What logits beside the hidden states pass through must ask for shapes, or leave them as they are."""
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        reason = "stages would assume hidden states without the logits beside them"
        refuse("moe_gating_residual", True, reason, "set variable_seq_lengths in the TransformerConfig")
    if config.cuda_graph_impl != "none":
        refuse("moe_gating_residual", True, "CUDA graphs assume hidden states alone", "set --cuda-graph-impl none")
    for name in ("mlp_chunks_for_training", "mlp_chunks_for_prefill"):
        if getattr(config, name) > 1:
            reason = "the logits of the whole sequence would meet the hidden states of one chunk"
            refuse(name, getattr(config, name), reason, "leave it at 1 with --moe-gating-residual")
    if config.fp32_residual_connection:
        reason = "the hidden states are then float32 between layers and the model's dtype within them"
        refuse("moe_gating_residual", True, reason, "leave --fp32-residual-connection off")


def _check_shared_fields(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    """A value may be said on either side, but not two different ones."""
    defaults = {f.name: f.default for f in fields(TransformerConfig)}
    for field in all_fields(DynMoEConfig):
        name = field.metadata.get("megatron")
        if name is None or (name.startswith("fp8_") and dynmoe.fp8_recipe == "none"):
            continue  # of Transformer Engine's recipe, not of ours
        theirs, ours = getattr(config, name), getattr(dynmoe, field.name)
        theirs = theirs[0] if isinstance(theirs, list) and len(theirs) == 1 else theirs
        if theirs not in (ours, defaults[name]):
            reason = f"DynMoEConfig.{field.name} says {ours!r}"
            refuse(name, theirs, reason, f"set both to the same value or leave this at {defaults[name]!r}")


def _check_dispatcher(config: TransformerConfig) -> None:
    if config.moe_expert_capacity_factor is not None or config.moe_pad_expert_input_to_capacity:
        reason = "one capacity for all experts is T * k / E with a fixed k, so rows would be dropped or padded"
        refuse("moe_expert_capacity_factor", config.moe_expert_capacity_factor, reason, "leave it unset (dropless)")
    if config.moe_expert_rank_capacity_factor is not None:
        reason = "its budget is T * k * factor rows a rank with a fixed k, and HybridEP drops what is above"
        instead = "leave it unset (dropless)"
        refuse("moe_expert_rank_capacity_factor", config.moe_expert_rank_capacity_factor, reason, instead)


def _check_capture(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    if config.transformer_impl == "inference_optimized":
        reason = "its router and experts assume a fixed k"
        refuse("transformer_impl", config.transformer_impl, reason, "use 'transformer_engine' or 'local'")
    if config.cuda_graph_impl == "none":
        return
    modules = [getattr(module, "name", module) for module in (config.cuda_graph_modules or [])]
    captured = {"moe", "moe_preprocess"} & set(modules)
    if captured or not modules:
        reason = "the number of rows changes every step, and a CUDA graph fixes it when it is captured"
        value = modules or "all modules"
        refuse(
            "cuda_graph_modules", value, reason, "capture 'attn' (and 'moe_router') only, or set --cuda-graph-impl none"
        )
    if "moe_router" in modules:
        _check_captured_router(modules, dynmoe)


def _check_captured_router(modules: list[str], dynmoe: DynMoEConfig) -> None:
    beside = {
        "zero-computation experts": bool(dynmoe.zero_computation_experts),
        "--moe-residual": dynmoe.residual,
    }
    beside |= {kind.flag or f"the controller {kind.__name__}": True for kind in dynmoe.controllers}
    for what, wanted in beside.items():
        if wanted:
            reason = f"a replayed graph runs nothing of what {what} does beside the router"
            refuse("cuda_graph_modules", modules, reason, "capture 'attn' only, or set --cuda-graph-impl none")
