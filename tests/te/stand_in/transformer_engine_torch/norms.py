"""LayerNorm and RMSNorm: ``csrc/extensions/normalization.cpp``. Computed in float32, as the kernels do."""

from typing import Any

import torch

from transformer_engine_torch.dtypes import to_torch
from transformer_engine_torch.quantize import quantize


def _gamma(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def _finish(y: torch.Tensor, ln_out: Any, quantizer: Any, out_dtype: Any) -> Any:
    if quantizer is not None:
        return quantize(y.to(to_torch(out_dtype)), quantizer, ln_out)
    if ln_out is None:
        return y.to(to_torch(out_dtype))
    return ln_out.copy_(y)


def layernorm_fwd(x, weight, bias, eps, ln_out, quantizer, out_dtype, sm_margin, zero_centered):
    """Returns the output, the mean [rows] and the inverse deviation [rows], both float32."""
    wide = x.float()
    mean = wide.mean(-1)
    rsigma = torch.rsqrt(wide.var(-1, unbiased=False) + eps)
    y = (wide - mean[..., None]) * rsigma[..., None] * _gamma(weight, zero_centered)
    y = y if bias is None else y + bias.float()
    return _finish(y, ln_out, quantizer, out_dtype), mean.flatten(), rsigma.flatten()


def layernorm_bwd(dz, x, mean, rsigma, gamma, sm_margin, zero_centered):
    """Returns the gradients of input, weight and bias."""
    rows = x.reshape(-1, x.shape[-1]).float()
    grad = dz.reshape(rows.shape).float()
    normal = (rows - mean[:, None]) * rsigma[:, None]
    scaled = grad * _gamma(gamma, zero_centered)
    dx = scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)
    dx = (dx * rsigma[:, None]).to(x.dtype).view(x.shape)
    return dx, (grad * normal).sum(0).to(gamma.dtype), grad.sum(0).to(gamma.dtype)


def rmsnorm_fwd(x, weight, eps, ln_out, quantizer, out_dtype, sm_margin, zero_centered):
    """Returns the output, None, and the inverse root mean square [rows] in float32."""
    wide = x.float()
    rsigma = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rsigma[..., None] * _gamma(weight, zero_centered)
    return _finish(y, ln_out, quantizer, out_dtype), None, rsigma.flatten()


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered):
    """Returns the gradients of input and weight."""
    rows = x.reshape(-1, x.shape[-1]).float()
    grad = dz.reshape(rows.shape).float()
    normal = rows * rsigma[:, None]
    scaled = grad * _gamma(gamma, zero_centered)
    dx = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * rsigma[:, None]
    return dx.to(x.dtype).view(x.shape), (grad * normal).sum(0).to(gamma.dtype)


def rmsnorm_bwd_add(dz, x, add, rsigma, gamma, sm_margin, zero_centered):
    """As ``rmsnorm_bwd``, with ``add`` on top of the gradient of the input."""
    dx, dgamma = rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered)
    return dx + add.view(dx.shape), dgamma
