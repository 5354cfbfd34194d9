"""Between the extension's data types and torch's."""

import torch

from transformer_engine_torch.names import DType

_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def to_torch(dtype: int | torch.dtype) -> torch.dtype:
    """Torch's data type for one of the extension's or of Transformer Engine's Python."""
    return dtype if isinstance(dtype, torch.dtype) else _TORCH[DType(int(dtype))]
