"""Multi-tensor operations: ``csrc/extensions/multi_tensor``. ``chunk_size`` and ``noop_flag`` come first in each.

``noop_flag`` is set where a number is not finite, by those that look; the others do nothing where it is set.
"""

from typing import Any

import torch

from transformer_engine_torch.quantize import scale_of_amax


def multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, lists: list, scale: float) -> None:
    """``lists[1] = lists[0] * scale``."""
    for source, target in zip(*lists, strict=True):
        if not torch.isfinite(source).all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(chunk_size: int, noop_flag: torch.Tensor, lists: list, scale: torch.Tensor) -> None:
    multi_tensor_scale(chunk_size, noop_flag, lists, scale.item())


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, lists: list, per_tensor: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm over all tensors [1], and with ``per_tensor`` each one's [tensors]."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_zeros(0)


def multi_tensor_unscale_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, lists: list, inv_scale: torch.Tensor, per_tensor: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = [tensor.float() * inv_scale for tensor in lists[0]]
    return multi_tensor_l2norm(chunk_size, noop_flag, [scaled], per_tensor)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    lists: list,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Gradients, parameters, moments, and float32 copies of parameters if there are five lists. Mode 1 is AdamW."""
    if noop_flag.item():
        return
    correct1, correct2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, mean, square, *main in zip(*lists, strict=True):
        p, g = (main[0] if main else parameter).float(), grad.float()
        if mode == 0:
            g = g + weight_decay * p
        m = beta1 * mean.float() + (1 - beta1) * g
        v = beta2 * square.float() + (1 - beta2) * g * g
        update = (m / correct1) / ((v / correct2).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * p
        p = p - lr * update
        mean.copy_(m), square.copy_(v), parameter.copy_(p)
        if main:
            main[0].copy_(p)


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop_flag: torch.Tensor,
    lists: list,
    max_fp8: float,
    force_pow_2_scales: bool,
    epsilon: float,
) -> None:
    """Largest magnitudes to scales and their inverses: lists of amaxes, scales, inverses."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_of_amax(amax, max_fp8, force_pow_2_scales, epsilon))
        inverse.copy_(1 / scale)


def _absent(name: str) -> Any:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"the stand-in has no {name}")

    return absent


# Looked up when Transformer Engine is imported, and called by nothing that megatron does on Hopper.
for _name in (
    "multi_tensor_adam_param_remainder",
    "multi_tensor_adam_fp8",
    "multi_tensor_adam_capturable",
    "multi_tensor_adam_capturable_master",
    "multi_tensor_sgd",
    "multi_tensor_compute_scale_inv_e8m0",
):
    globals()[_name] = _absent(_name)
