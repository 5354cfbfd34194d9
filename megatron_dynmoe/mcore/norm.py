"""Layer norms in plain torch that work under sequence parallelism.

Megatron's local layer spec takes ``WrappedTorchNorm``, which refuses ``sequence_parallel``
(megatron/core/transformer/torch_norm.py:50). The refusal is about one thing: under sequence parallelism each
tensor-parallel rank normalises its own slice of the sequence, so the gradient of the replicated weight is a partial
sum, and megatron adds up the gradients of exactly those parameters that carry ``param.sequence_parallel = True``
(megatron/core/distributed/finalize_model_grads.py). The norms here carry the mark.
"""

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019, equation 4).

    The mean of squares is float32 whatever the dtype of ``x``; the result has the dtype of ``x``.

    Args:
        config: read for ``sequence_parallel``, ``layernorm_zero_centered_gamma`` and ``params_dtype``.
        hidden_size: size of the last dimension.
        eps: added to the mean of squares.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [..., hidden_size]."""
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, in float32; result in the dtype of x.

    Arguments as for ``RMSNorm``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: [..., hidden_size]."""
        weight, bias = self.weight.float(), self.bias.float()
        return torch.nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """The norm that ``config.normalization`` names; stands in a layer spec wherever ``WrappedTorchNorm`` does.

    Raises:
        ValueError: ``config.normalization`` is neither "RMSNorm" nor "LayerNorm", or asks for a zero-centered weight.
    """
    norms = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
    if config.normalization not in norms:
        raise ValueError(
            f"normalization is {config.normalization!r}; without Transformer Engine it is one of {sorted(norms)}"
        )
    return norms[config.normalization](config=config, hidden_size=hidden_size, eps=eps)


def _mark(norm: torch.nn.Module, config: TransformerConfig) -> None:
    if config.layernorm_zero_centered_gamma:
        raise ValueError("layernorm_zero_centered_gamma is True; without Transformer Engine it must be False")
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel


def replace_norms(spec: Any) -> Any:
    """A copy of a layer or block spec with ``build_norm`` wherever the stock torch norm stands.

    Args:
        spec: ``TransformerBlockSubmodules``, ``ModuleSpec``, or any dataclass, list or ``functools.partial`` of such.

    Returns:
        The same structure; ``spec`` itself is not touched.
    """
    if spec is WrappedTorchNorm:
        return build_norm
    if isinstance(spec, list | tuple):
        return type(spec)(replace_norms(item) for item in spec)
    if isinstance(spec, functools.partial):
        keywords = {name: replace_norms(value) for name, value in spec.keywords.items()}
        return functools.partial(spec.func, *spec.args, **keywords)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = [field.name for field in dataclasses.fields(spec) if field.init]
        return dataclasses.replace(spec, **{name: replace_norms(getattr(spec, name)) for name in fields})
    return spec
