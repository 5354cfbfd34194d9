"""Matrix products: ``csrc/extensions/gemm.cpp``.

The extension speaks cuBLAS' column-major language. In torch's words the result is ``op(B) @ op(A)``, where ``op``
transposes what its flag says. Products are computed in float32 and rounded once, which is what an accumulator in
float32 gives.
"""

from typing import Any

import torch
import torch.nn.functional as F

from transformer_engine_torch.dtypes import to_torch
from transformer_engine_torch.quantize import dequantize_for_gemm, is_fp8, quantize


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, torch.Tensor | None, torch.Tensor | None, Any]:
    """One product, with its epilogue: returns (output, gradient of the bias, input of the GELU, ``extra_output``)."""
    if comm_overlap is not None:
        raise NotImplementedError("the stand-in has no overlap through user buffers")
    kind = to_torch(out_dtype) if out_dtype is not None else (A.dtype if D is None else D.dtype)
    result, bias_grad, gelu_out = _product(A, transa, B, transb, bias, gelu, gelu_in, grad, kind)
    result = result * alpha
    if D is not None:
        if out_dtype is not None and D.dtype != kind:
            raise ValueError(f"GEMM output is {D.dtype}, expected {kind}")
        return _store(result, D, accumulate, beta), bias_grad, gelu_out, extra_output
    result = result.to(kind)
    return (result if quantizer is None else quantize(result, quantizer)), bias_grad, gelu_out, extra_output


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    D: list[torch.Tensor],
    D_type: Any,
    m_splits: list[int],
    bias: list[torch.Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: list[torch.Tensor],
    grad: bool,
    workspace: list[torch.Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[torch.Tensor]:
    """A product for each pair; with ``single_output`` the results lie one after the other in ``D[0]``.

    As in the extension, a pair without rows leaves what is accumulated as it is, and zeros elsewhere.
    """
    outputs = D[0].split(m_splits) if single_output else D
    for i, (a, b, out) in enumerate(zip(A, B, outputs, strict=True)):
        own_bias = bias[i] if i < len(bias) and bias[i].numel() else None
        pre_gelu = pre_gelu_out[i] if i < len(pre_gelu_out) and pre_gelu_out[i].numel() else None
        if not _numel(a) or not _numel(b):
            if not accumulate:
                out.zero_()
            if grad and own_bias is not None:
                own_bias.zero_()
            continue
        gelu_in = pre_gelu if grad else None
        result, bias_grad, gelu_out = _product(
            a, transa, b, transb, own_bias, pre_gelu is not None, gelu_in, grad, out.dtype
        )
        _store(result, out, accumulate)
        if grad and own_bias is not None:
            own_bias.copy_(bias_grad)
        elif pre_gelu is not None and not grad:
            pre_gelu.copy_(gelu_out)
    return bias


def _product(A, transa, B, transb, bias, gelu, gelu_in, grad, kind):
    a, b = dequantize_for_gemm(A, transa), dequantize_for_gemm(B, not transb)
    lead = b.shape[:-1]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    left, right = b.T if transb else b, a.T if transa else a
    _check_alignment(A, B, left, right)
    result = left @ right
    if not transb:
        result = result.reshape(*lead, result.shape[-1])
    bias_grad = gelu_out = None
    if bias is not None and grad:
        bias_grad = b.sum(0).to(kind)
    elif bias is not None:
        result = result + bias.float()
    if gelu and grad:
        result = result * _gelu_derivative(gelu_in.float())
    elif gelu:
        gelu_out = result.to(kind)
        result = F.gelu(result, approximate="tanh")
    return result, bias_grad, gelu_out


def _check_alignment(A: Any, B: Any, left: torch.Tensor, right: torch.Tensor) -> None:
    """What ``CanonicalizeGemmInput`` of common/gemm/cublaslt_gemm.cu asks of FP8 operands on Hopper.

    Raises:
        RuntimeError: in the extension's words.
    """
    for name, tensor in (("A", A), ("B", B)):
        if is_fp8(tensor) and left.shape[1] % 16:
            raise RuntimeError(f"Leading dimension requirement on {name} for FP8 GEMM. Caller must pad.")
    square = [tensor._is_2D_scaled for tensor in (A, B) if hasattr(tensor, "_is_2D_scaled")]
    if square and right.shape[1] % 8:
        raise RuntimeError("Outer dimension requirement on A for NVTE_BLOCK_SCALING GEMM. Caller must pad.")
    if square and not square[-1] and left.shape[0] % 8:
        raise RuntimeError("Outer dimension requirement on B for NVTE_BLOCK_SCALING GEMM. Caller must pad.")


def _gelu_derivative(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)[0]


def _store(result: torch.Tensor, out: Any, accumulate: bool, beta: float | None = None) -> Any:
    result = result.view(out.shape)
    if accumulate:
        result = result + out.float() * (1.0 if beta is None else beta)
    out.copy_(result)
    return out


def _numel(tensor: Any) -> int:
    return tensor.numel() if isinstance(tensor, torch.Tensor) else tensor.size().numel()
