"""Blocks of two transformer layers in every preset and unit, as a model holds them, and a pass through one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.target.device import META, Layout

S, B, D = 12, 2, 32
LAYERS, EXPERTS = 2, 8

RECOMPUTE: dict[str, dict[str, Any]] = {
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
SHARED = {"moe_shared_expert_intermediate_size": 16}
FREE = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}


@dataclass(frozen=True)
class Case:
    """One block: a preset with fields on top, the unit on the wire, and fields of Megatron's configuration."""

    preset: str
    unit: str = "expert"
    dynmoe: dict[str, Any] = field(default_factory=dict)
    megatron: dict[str, Any] = field(default_factory=dict)
    recompute: str | None = None
    padded: bool = False

    def __str__(self) -> str:
        parts = [self.preset, self.unit, *self.dynmoe, *self.megatron, self.recompute and f"recompute {self.recompute}"]
        return ", ".join(filter(None, [*parts, "padded" if self.padded else None]))


def cases(*, brief: bool = False) -> list[Case]:
    """Every preset and unit, with each thing that changes the way of a token; ``brief``: what changes little apart."""
    from megatron_dynmoe.config import PRESETS

    found = []
    for preset, fields in PRESETS.items():
        for unit in ("expert", "rank"):
            found += [
                Case(preset, unit),
                Case(preset, unit, megatron=SHARED | {"moe_shared_expert_overlap": True}),
                Case(preset, unit, recompute="moe", megatron=SHARED),
            ]
        if brief:
            continue
        found += [
            Case(preset, "expert", dynmoe={"expert_backend": "sequential"}),
            Case(preset, "rank", megatron=SHARED),
            Case(preset, "rank", dynmoe={"residual": True}, megatron=SHARED),
            Case(preset, "expert", recompute="full", megatron=SHARED),
        ]
        bounds = {"max_experts_per_token": 2, "max_rows_per_token": 1.5, "capacity_gamma": 1.1}
        losses = {"z_loss_coeff": 1e-3, "input_jitter_eps": 1e-2}
        found += [Case(preset, dynmoe=bounds), Case(preset, dynmoe=losses), Case(preset, padded=True)]
        if fields.get("gate") != "cosine":
            carries = not fields.get("gating_residual", False)
            found.append(Case(preset, dynmoe={"gating_residual": carries}))
            found.append(Case(preset, dynmoe=FREE | {"gating_residual": not carries, "normalize_weights": True}))
    return found


def described(case: Case, layout: Layout, **extra: Any) -> tuple[Any, Any, Any]:
    """Megatron's configuration in bfloat16, its block's spec, and the dynamic layers' configuration."""
    import torch.nn.functional as F
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.config import DynMoEConfig

    dynmoe = DynMoEConfig.from_preset(case.preset, dispatch_unit=case.unit, **case.dynmoe)
    config = TransformerConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": D,
            "num_attention_heads": 2,
            "num_moe_experts": layout.experts,
            "moe_ffn_hidden_size": 48,
            "ffn_hidden_size": 48,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": layout.expert_ranks,
            "tensor_model_parallel_size": layout.tensor_ranks,
            "sequence_parallel": layout.tensor_ranks > 1,
            "expert_tensor_parallel_size": layout.tensor_ranks,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "bias_activation_fusion": False,
            "moe_router_pre_softmax": True,
            "normalization": "RMSNorm",
            "params_dtype": torch.bfloat16,
            "bf16": True,
            "hidden_dropout": 0.0,
        }
        | case.megatron
        | ({} if case.recompute is None else RECOMPUTE[case.recompute])
        | extra
    )
    return config, get_gpt_decoder_block_spec(config, use_transformer_engine=False), dynmoe


def build(case: Case, layout: Layout, **extra: Any) -> torch.nn.Module:
    """The block, moved to the device as training moves a model."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    config, spec, dynmoe = described(case, layout, **extra)
    block = TransformerBlock(config, dynamic_layer_spec(spec, dynmoe)).cuda()
    for layer in block.layers:
        if dynmoe.adaptive_experts:
            layer.mlp.router.take([layer.mlp.router.dynmoe.record_from, 1])  # a window is open
    return block


def inputs(layout: Layout, device: torch.device = META) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of this rank's share of the sequence, an attention mask, and a mask of padding."""
    x = torch.empty(S // layout.tensor_ranks, B, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.empty(1, 1, S, S, dtype=torch.bool, device=device)
    return x, mask, torch.empty(B, S // layout.tensor_ranks, dtype=torch.bool, device=device)
