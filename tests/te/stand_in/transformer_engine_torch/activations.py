"""Activations and their gradients: ``csrc/extensions/activation.cpp``. Each takes a quantizer last, or None."""

from typing import Any

import torch
import torch.nn.functional as F

from transformer_engine_torch.quantize import bgrad_quantize, quantize


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.chunk(2, dim=-1)


_FORMULAS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "srelu": lambda x: F.relu(x).square(),
    "swiglu": lambda x: F.silu(_halves(x)[0]) * _halves(x)[1],
    "geglu": lambda x: F.gelu(_halves(x)[0], approximate="tanh") * _halves(x)[1],
    "reglu": lambda x: F.relu(_halves(x)[0]) * _halves(x)[1],
    "glu": lambda x: torch.sigmoid(_halves(x)[0]) * _halves(x)[1],
}


def _forward(name: str) -> Any:
    def forward(x: torch.Tensor, quantizer: Any) -> Any:
        return quantize(_FORMULAS[name](x.float()).to(x.dtype), quantizer)

    return forward


def _backward(name: str) -> Any:
    def backward(grad: torch.Tensor, x: torch.Tensor, quantizer: Any) -> Any:
        with torch.enable_grad():
            wide = x.detach().float().requires_grad_()
            (result,) = torch.autograd.grad(_FORMULAS[name](wide), wide, grad.float())
        return quantize(result.to(x.dtype), quantizer)

    return backward


def _backward_with_bias(name: str) -> Any:
    def backward(grad: torch.Tensor, x: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
        return bgrad_quantize(_backward(name)(grad, x, None), quantizer)

    return backward


ALL = (
    {name: _forward(name) for name in _FORMULAS}
    | {f"d{name}": _backward(name) for name in _FORMULAS}
    | {f"dbias_d{name}": _backward_with_bias(name) for name in _FORMULAS}
)
