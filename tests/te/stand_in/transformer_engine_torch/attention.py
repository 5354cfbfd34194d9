"""Softmax and rotary embedding: ``csrc/extensions/softmax.cpp``, ``apply_rope.cpp``.

There is no fused attention here, so that Transformer Engine takes its own unfused one, which is plain torch.
"""

from typing import Any

import torch

from transformer_engine_torch.names import NVTE_Fused_Attn_Backend, NVTE_QKV_Format


def get_fused_attn_backend(*args: Any, **kwargs: Any) -> tuple[Any, str]:
    """None fits, and why."""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, "stand-in"


def _softmax(x: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = x.float() * scale
    if mask is None:
        return scores.softmax(-1).to(x.dtype)
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
    return torch.where(mask.all(-1, keepdim=True), torch.zeros_like(weights), weights).to(x.dtype)


def _softmax_backward(grad: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    wide, g = weights.float(), grad.float()
    return (scale * wide * (g - (wide * g).sum(-1, keepdim=True))).to(weights.dtype)


def scaled_softmax_forward(x: torch.Tensor, scale: float) -> torch.Tensor:
    return _softmax(x, None, scale)


def scaled_masked_softmax_forward(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return _softmax(x, mask.bool().expand(x.shape), scale)


def _later(x: torch.Tensor) -> torch.Tensor:
    queries, keys = x.shape[-2:]
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries).expand(x.shape)


def scaled_aligned_causal_masked_softmax_forward(x: torch.Tensor, scale: float) -> torch.Tensor:
    return _softmax(x, _later(x), scale)


scaled_upper_triang_masked_softmax_forward = scaled_aligned_causal_masked_softmax_forward
scaled_softmax_backward = scaled_masked_softmax_backward = _softmax_backward
scaled_upper_triang_masked_softmax_backward = scaled_aligned_causal_masked_softmax_backward = _softmax_backward


def _rotate(x: torch.Tensor, angles: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    """The first ``angles.shape[-1]`` numbers of each head turned; the rest passes."""
    width = angles.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]

    def quarter(y: torch.Tensor) -> torch.Tensor:  # its transpose is its negative
        if interleaved:
            return torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
        return torch.cat([-y[..., width // 2 :], y[..., : width // 2]], -1)

    sine = angles.sin()
    across = -quarter(turned * sine) if back else quarter(turned) * sine
    return torch.cat([(turned * angles.cos() + across).to(x.dtype), rest], -1)


def _fused_rope(x, freqs, form, interleaved, back):
    if form == NVTE_QKV_Format.NVTE_SBHD:
        angles = freqs[: x.shape[0]].view(x.shape[0], 1, 1, -1)
    elif form == NVTE_QKV_Format.NVTE_BSHD:
        angles = freqs[: x.shape[1]].view(1, x.shape[1], 1, -1)
    else:
        raise NotImplementedError("the stand-in turns sbhd and bshd only")
    return _rotate(x, angles.float(), interleaved, back).contiguous()


def fused_rope_forward(x, freqs, start_positions, form, interleaved, cu_seqlens, cp_size, cp_rank):
    """Queries or keys [S, B, H, D] or [B, S, H, D], turned by ``freqs`` [S, 1, 1, turned part of D]."""
    if cp_size != 1 or start_positions is not None:
        raise NotImplementedError("the stand-in turns whole sequences only")
    return _fused_rope(x, freqs, form, interleaved, back=False)


def fused_rope_backward(grad, freqs, start_positions, form, interleaved, cu_seqlens, cp_size, cp_rank):
    return _fused_rope(grad, freqs, form, interleaved, back=True)


def fused_qkv_rope_forward(
    qkv, q_freqs, k_freqs, start_positions, splits, form, interleaved, cp_size, cp_rank
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[S, B, groups, queries and key and value of a group] to queries, keys turned, and values, [S, B, heads, D]."""
    q, k, v = qkv.split(splits, dim=-1)
    q = q.reshape(*q.shape[:2], -1, splits[1])
    return (
        _fused_rope(q, q_freqs, form, interleaved, back=False),
        _fused_rope(k, k_freqs, form, interleaved, back=False),
        v.contiguous(),
    )


def fused_qkv_rope_backward(gq, gk, gv, q_freqs, k_freqs, splits, form, interleaved, cp_size, cp_rank):
    q = _fused_rope(gq, q_freqs, form, interleaved, back=True).view(*gk.shape[:3], splits[0])
    return torch.cat([q, _fused_rope(gk, k_freqs, form, interleaved, back=True), gv], dim=-1)
