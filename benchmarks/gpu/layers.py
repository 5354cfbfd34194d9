"""One MoE layer on the device at hand, its passes, and maps that routers seldom make."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer_quick import start_megatron
from megatron_dynmoe.routers.routing import Routing

__all__ = ["build", "has_te", "start_megatron", "torch_layer"]

ROOT = Path(__file__).resolve().parent.parent.parent
S, B, D, F, E = 96, 2, 128, 192, 8
SEED = 5


def device() -> str:
    """Where layers compute: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_te() -> bool:
    """Whether Transformer Engine can be imported, or what stands in for it."""
    return importlib.util.find_spec("transformer_engine") is not None


def build(
    dynmoe: Any,
    *,
    te: bool = False,
    dtype: torch.dtype = torch.float32,
    width: int = D,
    inner: int = F,
    experts: int = E,
    **extra: Any,
) -> Any:
    """A dynamic layer of megatron's local or Transformer Engine spec; with ``dynmoe`` None megatron's own.

    Args:
        te: Transformer Engine's spec.
        width, inner, experts: D, F and E.
        extra: fields of TransformerConfig.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": width,
        "num_attention_heads": 2,
        "num_moe_experts": experts,
        "ffn_hidden_size": inner,
        "moe_ffn_hidden_size": inner,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        "moe_router_pre_softmax": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    config = TransformerConfig(**(settings | extra))
    spec = layer_spec(experts, te=te)
    layer = (spec if dynmoe is None else dynamic_layer_spec(spec, dynmoe)).submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer


def layer_spec(experts: int, *, te: bool) -> Any:
    """megatron-core's layer spec, of which the MoE layer is taken."""
    from megatron.core.models.gpt import gpt_layer_specs as specs

    if te:
        return specs.get_gpt_layer_with_transformer_engine_spec(num_experts=experts, moe_grouped_gemm=True)
    return specs.get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")


def torch_layer(dtype: torch.dtype, p: float, **extra: Any) -> Any:
    """A layer with torch experts, weights large enough that routing is uneven and every product matters."""
    from megatron_dynmoe.config import DynMoEConfig

    layer = build(DynMoEConfig(top_p=p, expert_backend="torch"), dtype=dtype, **extra)
    torch.manual_seed(SEED)
    with torch.no_grad():
        layer.router.weight.normal_(std=0.15)
        layer.experts.weight1.normal_(std=D**-0.5)
        layer.experts.weight2.normal_(std=F**-0.5)
    return layer


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states [S, B, D] and a gradient of the output."""
    torch.manual_seed(SEED + 1)
    return torch.randn(S, B, D, device=device()).to(dtype), torch.randn(S, B, D, device=device()).to(dtype)


def layer_pass(layer: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and the same gradients of the layer with torch experts."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out, _ = layer(x)
    out.backward(grad)
    return [out.detach(), x.grad, layer.router.weight.grad, layer.experts.weight1.grad, layer.experts.weight2.grad]


NAMES = ("output", "input gradient", "router gradient", "fc1 gradient", "fc2 gradient")


def no_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and a map in which no token visits any expert (what a router of a later kind may decide)."""
    weights = torch.zeros(x.shape[0] * x.shape[1], E, device=x.device, requires_grad=True)
    return weights, torch.zeros(x.shape[0] * x.shape[1], E, dtype=torch.bool, device=x.device)


def one_expert(x: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens to the last expert, the others have no row."""
    weights, chosen = no_rows(x)
    chosen[:, -1] = True
    return weights.detach().add_(0.5).requires_grad_(), chosen


def uneven(x: Tensor) -> tuple[Tensor, Tensor]:
    """Token t visits t modulo E experts; expert 0 nobody, the last the most."""
    weights, _ = no_rows(x)
    experts = torch.arange(E, device=x.device)
    chosen = experts >= E - torch.arange(len(weights), device=x.device).unsqueeze(1) % E
    return torch.where(chosen, 0.5, 0.0).requires_grad_(), chosen


def routed(layer: Any, choose: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> None:
    """From now on the layer's router answers with what ``choose`` makes of ``x``."""
    answers(layer, *choose(x))


def answers(layer: Any, weights: Tensor, chosen: Tensor) -> None:
    """From now on the layer's router answers with these weights and this map, [T, E]."""
    none = torch.zeros((), dtype=torch.int64, device=weights.device)
    routing = Routing(weights, chosen, weights.detach(), weights.detach(), chosen.shape[1], none, none)
    layer.router.forward = lambda *args, **kwargs: routing
