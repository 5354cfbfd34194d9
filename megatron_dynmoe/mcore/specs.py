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
from megatron_dynmoe.mcore.adaptive_router import AdaptiveRouter
from megatron_dynmoe.mcore.carry import CarryingTransformerLayer
from megatron_dynmoe.mcore.experts import TorchGroupedMLP, why_not_torch
from megatron_dynmoe.mcore.layer import DynMoELayer
from megatron_dynmoe.mcore.norm import replace_norms
from megatron_dynmoe.mcore.router import DynamicRouter
from megatron_dynmoe.mcore.te_experts import with_scales_by_expert


def dynamic_layer_spec(spec: Any, dynmoe: DynMoEConfig) -> Any:
    """A copy of ``spec`` in which every MoE layer is dynamic; dense layers and attention stay.

    Norms of plain torch are replaced by ones that also serve sequence parallelism (same parameters, same values).

    Args:
        spec: a layer ``ModuleSpec`` or a ``TransformerBlockSubmodules``, as megatron-core's ``get_gpt_*_spec`` return.
        dynmoe: the routers' configuration.

    Raises:
        ConfigError: the spec has no MoE layer.
    """
    spec = replace_norms(spec)
    layers = spec.layer_specs if hasattr(spec, "layer_specs") else [spec]
    if dynmoe.gating_residual:
        for layer in layers:
            _carry(layer)
    replaced = [_rewrite(layer.submodules, dynmoe) for layer in layers]
    # A block may be one pipeline stage's share of the layers, all of them dense; a single layer must be an MoE layer.
    if not any(replaced) and not hasattr(spec, "layer_specs"):
        raise ConfigError("the layer spec has no MoE layer to make dynamic; build it with num_experts set.")
    return spec


def dynamic_mtp_spec(spec: MultiTokenPredictionBlockSubmodules, dynmoe: DynMoEConfig | None) -> Any:
    """A copy of the spec of multi-token prediction in which MoE layers are dynamic; norms as in the decoder's spec.

    Args:
        spec: as megatron-core's ``get_gpt_mtp_block_spec`` returns.
        dynmoe: the routers' configuration; ``None``: norms alone.
    """
    spec = replace_norms(spec)
    for layer in spec.layer_specs if dynmoe is not None else ():
        inner = layer.submodules.mtp_model_layer
        if _rewrite(inner.submodules, dynmoe) and dynmoe.gating_residual:
            _carry(inner)
    return spec


def _carry(layer: ModuleSpec) -> None:
    if layer.module not in (TransformerLayer, CarryingTransformerLayer):
        raise ConfigError(
            f"--moe-gating-residual needs layers of TransformerLayer, to carry logits on; the spec has {layer.module}."
        )
    layer.module = CarryingTransformerLayer


def _rewrite(submodules: Any, dynmoe: DynMoEConfig) -> bool:
    mlp = submodules.mlp
    if not (isinstance(mlp, partial) and isinstance(mlp.func, type) and issubclass(mlp.func, MoELayer)):
        return False
    stock: MoESubmodules = mlp.keywords["submodules"]
    ours = MoESubmodules(
        experts=partial(build_experts, stock=stock.experts, backend=dynmoe.expert_backend),
        shared_experts=stock.shared_experts,
        router=partial(AdaptiveRouter if dynmoe.adaptive_experts else DynamicRouter, dynmoe=dynmoe),
    )
    submodules.mlp = partial(DynMoELayer, submodules=ours, dynmoe=dynmoe)
    return True


def build_experts(num_local_experts: int, config: TransformerConfig, *, stock: Any, backend: str, **kwargs: Any) -> Any:
    """The experts that ``backend`` names; ``stock`` is what the layer spec would have built.

    Raises:
        ConfigError: the spec does not offer the backend.
    """
    offered = stock.func if isinstance(stock, partial) else stock
    has_te = isinstance(offered, type) and issubclass(offered, TEGroupedMLP)
    if backend == "auto":
        backend = "te" if has_te else "torch" if why_not_torch(config) is None else "sequential"
    if backend == "torch":
        return TorchGroupedMLP(num_local_experts, config, **kwargs)
    if backend == "te" and not has_te:
        raise ConfigError(
            "--moe-expert-backend is 'te', which needs Transformer Engine with --transformer-impl transformer_engine "
            "and --moe-grouped-gemm; otherwise use 'torch' or 'sequential'."
        )
    if backend == "sequential" and not issubclass(offered, SequentialMLP):
        raise ConfigError(
            "--moe-expert-backend is 'sequential', but --moe-grouped-gemm asks for grouped experts; "
            "drop one of the two."
        )
    if backend == "te" and isinstance(stock, partial):
        stock = with_scales_by_expert(stock)
    return stock(num_local_experts, config, **kwargs)
