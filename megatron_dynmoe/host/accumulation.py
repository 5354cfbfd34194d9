"""Weight gradients added into ``main_grad`` by the product that makes them, without apex."""

import sys
from contextlib import ExitStack
from types import ModuleType

import torch

from megatron_dynmoe.host.replace import replace

NAME = "fused_weight_gradient_mlp_cuda"


def accumulate_with_transformer_engine(undo: ExitStack) -> None:
    """Put a module over Transformer Engine's GEMM where megatron misses apex' extension of that name.

    Megatron's output layer is its own ``ColumnParallelLinear``, with Transformer Engine too. It accumulates with apex'
    kernel or is not built (megatron/core/tensor_parallel/layers.py:1070 of 0.19.2); and the flag that turns this off
    turns it off in Transformer Engine's layers as well, which need no apex for it. Nothing happens where apex is, or
    where Transformer Engine is not. As in all of its layers, float32 operands are multiplied as TF32 on a GPU
    (common/gemm/cublaslt_gemm.cu); 16-bit ones lose nothing.
    """
    from megatron.core.extensions.transformer_engine import te_general_gemm
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available or te_general_gemm is None:
        return
    module = ModuleType(NAME, "Weight gradients by Transformer Engine's GEMM: see megatron_dynmoe.host.accumulation.")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = _accumulate  # type: ignore[attr-defined]
    sys.modules[NAME] = module
    undo.callback(sys.modules.pop, NAME)
    replace(undo, layers, **{NAME: module}, _grad_accum_fusion_available=True)


def _accumulate(inputs: torch.Tensor, grads: torch.Tensor, main_grad: torch.Tensor) -> None:
    """``main_grad`` [outputs, inputs] += ``grads`` [rows, outputs] transposed times ``inputs`` [rows, inputs]."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(inputs, grads, out_dtype=main_grad.dtype, layout="NT", out=main_grad, accumulate=True, grad=True)
