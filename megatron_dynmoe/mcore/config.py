"""What of Megatron's configuration a dynamic MoE layer accepts, checked when the layer is built.

Every refusal names the field, its value, why it cannot work and what to set instead.
"""

from __future__ import annotations

from dataclasses import fields

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmoe.config import ConfigError, DynMoEConfig

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
        _refuse("num_experts", experts, "a dynamic MoE layer needs experts", "set --num-experts to at least 1")
    if experts % ranks:
        _refuse(
            "num_experts",
            experts,
            f"experts are divided evenly over the {ranks} ranks of --expert-model-parallel-size",
            f"use a multiple of {ranks}",
        )
    columns = experts + dynmoe.zero_computation_experts
    if dynmoe.rule == "top-k" and dynmoe.topk > columns:
        _refuse("moe_router_topk", dynmoe.topk, f"there are {columns} experts", f"use 1 to {columns}")
    if dynmoe.initial_experts is not None and dynmoe.initial_experts > experts:
        _refuse("moe_initial_experts", dynmoe.initial_experts, f"there are {experts} slots", f"use 1 to {experts}")
    _check_residual(config, dynmoe)
    _check_local(config, dynmoe)
    if dynmoe.gating_residual:
        _check_carry(config)
    _check_shared_fields(config, dynmoe)
    for name, (accepted, reason) in _CHOOSES_EXPERTS.items():
        value = getattr(config, name)
        if value != accepted:
            _refuse(name, value, reason, f"leave it at {accepted!r}")
    balancing = config.moe_router_load_balancing_type
    if balancing not in ("aux_loss", "none"):
        reason = "the stock balancing losses rebuild a top-k map (moe_utils.py:946)"
        _refuse("moe_router_load_balancing_type", balancing, reason, "use 'aux_loss' (our load-balance loss) or 'none'")
    _check_dispatcher(config)
    _check_capture(config)


def _check_residual(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    if not dynmoe.residual:
        return
    if not config.moe_shared_expert_intermediate_size:
        reason, instead = "there is no dense expert to mix with", "set --moe-shared-expert-intermediate-size"
        _refuse("moe_residual", True, reason, instead)
    if config.moe_shared_expert_overlap:
        reason = "the overlapped shared expert is added to the routed ones before they can be mixed"
        _refuse("moe_shared_expert_overlap", True, reason, "leave it off with --moe-residual")


def _check_local(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    local = {"moe_residual": dynmoe.residual, "moe_zero_experts": bool(dynmoe.zero_computation_experts)}
    local |= {"moe_gating_residual": dynmoe.gating_residual}
    if config.overlap_moe_expert_parallel_comm:
        for name, wanted in local.items():
            if wanted:
                reason = "a layer that computes two micro-batches at once would mix up what it keeps between its parts"
                _refuse(name, True, reason, "leave --overlap-moe-expert-parallel-comm off")


def _check_carry(config: TransformerConfig) -> None:
    """What logits beside the hidden states pass through must ask for shapes, or leave them as they are."""
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        reason = "stages would assume hidden states without the logits beside them"
        _refuse("moe_gating_residual", True, reason, "set variable_seq_lengths in the TransformerConfig")
    if config.cuda_graph_impl != "none":
        _refuse("moe_gating_residual", True, "CUDA graphs assume hidden states alone", "set --cuda-graph-impl none")
    if config.fp32_residual_connection:
        reason = "the hidden states are then float32 between layers and the model's dtype within them"
        _refuse("moe_gating_residual", True, reason, "leave --fp32-residual-connection off")


def _check_shared_fields(config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    """A value may be said on either side, but not two different ones."""
    defaults = {f.name: f.default for f in fields(TransformerConfig)}
    for field in fields(DynMoEConfig):
        name = field.metadata.get("megatron")
        if name is None:
            continue
        theirs, ours = getattr(config, name), getattr(dynmoe, field.name)
        if theirs not in (ours, defaults[name]):
            reason = f"DynMoEConfig.{field.name} says {ours!r}"
            _refuse(name, theirs, reason, f"set both to the same value or leave this at {defaults[name]!r}")


def _check_dispatcher(config: TransformerConfig) -> None:
    if config.moe_expert_capacity_factor is not None or config.moe_pad_expert_input_to_capacity:
        reason = "one capacity for all experts is T * k / E with a fixed k, so rows would be dropped or padded"
        _refuse("moe_expert_capacity_factor", config.moe_expert_capacity_factor, reason, "leave it unset (dropless)")
    if config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend != "hybridep":
        backend = config.moe_flex_dispatcher_backend
        reason = f"{backend} sends a fixed k rows a token (token_dispatcher.py:1291, 1590), whatever the map says"
        _refuse(
            "moe_flex_dispatcher_backend", backend, reason, "use 'hybridep', or --moe-token-dispatcher-type alltoall"
        )


def _check_capture(config: TransformerConfig) -> None:
    if config.transformer_impl == "inference_optimized":
        reason = "its router and experts assume a fixed k"
        _refuse("transformer_impl", config.transformer_impl, reason, "use 'transformer_engine' or 'local'")
    if config.cuda_graph_impl == "none":
        return
    modules = [getattr(module, "name", module) for module in (config.cuda_graph_modules or [])]
    captured = {"moe", "moe_preprocess"} & set(modules)
    if captured or not modules:
        reason = "the number of rows changes every step, and a CUDA graph fixes it when it is captured"
        value = modules or "all modules"
        _refuse(
            "cuda_graph_modules", value, reason, "capture 'attn' (and 'moe_router') only, or set --cuda-graph-impl none"
        )


def _refuse(name: str, value: object, reason: str, instead: str) -> None:
    flag = "--" + name.replace("_", "-")
    raise ConfigError(f"{flag} is {value!r}, which a dynamic MoE layer cannot serve: {reason}; {instead}.")
