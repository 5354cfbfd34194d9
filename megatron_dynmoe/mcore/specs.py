"""Turn a stock GPT layer spec into a dynamic one."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.mcore.carry import CarryingTransformerLayer
from megatron_dynmoe.mcore.experts import TorchGroupedMLP, why_not_torch
from megatron_dynmoe.mcore.fp8_checks import recipe_of
from megatron_dynmoe.mcore.fp8_experts import Fp8GroupedMLP
from megatron_dynmoe.mcore.fp8_state import pass_by_scales
from megatron_dynmoe.mcore.layer import DynMoELayer
from megatron_dynmoe.mcore.norm import replace_norms
from megatron_dynmoe.mcore.router import DynamicRouter
from megatron_dynmoe.mcore.te_experts import with_scales_by_expert

# The norm before a layer's feed-forward part is a module of its own here, or part of the linear layer behind it, as
# Transformer Engine has it in dense layers. megatron's local spec maps the former to the latter's names in every layer,
# also where Transformer Engine's spec has a norm of its own: before experts.
NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def dynamic_layer_spec(spec: Any, dynmoe: DynMoEConfig, *, fused_norm: bool | None = None) -> Any:
    """A copy of ``spec`` in which every MoE layer is dynamic; dense layers and attention stay.

    Norms of plain torch are replaced by ones that also serve sequence parallelism (same parameters, same values).

    Args:
        spec: a layer ``ModuleSpec`` or a ``TransformerBlockSubmodules``, as megatron-core's ``get_gpt_*_spec`` return.
        dynmoe: the routers' configuration.
        fused_norm: whether a checkpoint has the norms before experts under the names of a fused one; ``None``: as the
            spec says.

    Raises:
        ConfigError: the spec has no MoE layer.
    """
    spec = replace_norms(spec)
    layers = spec.layer_specs if hasattr(spec, "layer_specs") else [spec]
    if dynmoe.gating_residual:
        for layer in layers:
            _carry(layer)
    replaced = [_rewrite(layer.submodules, dynmoe, fused_norm) for layer in layers]
    # A block may be one pipeline stage's share of the layers, all of them dense; a single layer must be an MoE layer.
    if not any(replaced) and not hasattr(spec, "layer_specs"):
        raise ConfigError("the layer spec has no MoE layer to make dynamic; build it with num_experts set.")
    return spec


def dynamic_mtp_spec(
    spec: MultiTokenPredictionBlockSubmodules, dynmoe: DynMoEConfig | None, *, fused_norm: bool | None = None
) -> Any:
    """A copy of the spec of multi-token prediction in which MoE layers are dynamic; norms as in the decoder's spec.

    Args:
        spec: as megatron-core's ``get_gpt_mtp_block_spec`` returns.
        dynmoe: the routers' configuration; ``None``: norms alone.
        fused_norm: as in :func:`dynamic_layer_spec`.
    """
    spec = replace_norms(spec)
    if dynmoe is None:
        return spec
    for layer in spec.layer_specs:
        inner = layer.submodules.mtp_model_layer
        if _rewrite(inner.submodules, dynmoe, fused_norm) and dynmoe.gating_residual:
            _carry(inner)
    return spec


def _carry(layer: ModuleSpec) -> None:
    if layer.module not in (TransformerLayer, CarryingTransformerLayer):
        raise ConfigError(
            f"--moe-gating-residual needs layers of TransformerLayer, to carry logits on; the spec has {layer.module}."
        )
    layer.module = CarryingTransformerLayer


def _rewrite(submodules: Any, dynmoe: DynMoEConfig, fused_norm: bool | None) -> bool:
    mlp = submodules.mlp
    if not (isinstance(mlp, partial) and isinstance(mlp.func, type) and issubclass(mlp.func, MoELayer)):
        return False
    stock: MoESubmodules = mlp.keywords["submodules"]
    ours = MoESubmodules(
        experts=partial(build_experts, stock=stock.experts, dynmoe=dynmoe),
        shared_experts=stock.shared_experts,
        router=partial(DynamicRouter, dynmoe=dynmoe),
    )
    submodules.mlp = partial(DynMoELayer, submodules=ours, dynmoe=dynmoe)
    if fused_norm is not None:
        others = {name: key for name, key in submodules.sharded_state_dict_keys_map.items() if name not in NORM}
        submodules.sharded_state_dict_keys_map = others | (NORM if fused_norm else {})
    return True


def build_experts(
    num_local_experts: int, config: TransformerConfig, *, stock: Any, dynmoe: DynMoEConfig, **kwargs: Any
) -> Any:
    """The experts that ``dynmoe`` names; ``stock`` is what the layer spec would have built.

    Raises:
        ConfigError: the spec does not offer the backend.
    """
    offered = stock.func if isinstance(stock, partial) else stock
    has_te = isinstance(offered, type) and issubclass(offered, TEGroupedMLP)
    backend, recipe = dynmoe.expert_backend, recipe_of(dynmoe)
    if recipe is not None:
        return Fp8GroupedMLP(num_local_experts, config, recipe=recipe, emulate=dynmoe.fp8_emulate, **kwargs)
    if backend == "auto":
        backend = "te" if has_te else "torch" if why_not_torch(config) is None else "sequential"
    if backend == "torch":
        return TorchGroupedMLP(num_local_experts, config, **kwargs)
    if backend == "te" and not has_te:
        raise ConfigError(
            "--moe-expert-backend is 'te', which needs Transformer Engine with --transformer-impl transformer_engine "
            "and --moe-grouped-gemm; otherwise use 'torch' or 'sequential'."
        )
    if backend == "sequential" and not (isinstance(offered, type) and issubclass(offered, SequentialMLP)):
        raise ConfigError(
            "--moe-expert-backend is 'sequential', but --moe-grouped-gemm asks for grouped experts; "
            "drop one of the two."
        )
    if backend == "te" and isinstance(stock, partial):
        stock = with_scales_by_expert(stock)
    experts = stock(num_local_experts, config, **kwargs)
    if backend == "te":
        pass_by_scales(experts)
    return experts
