"""The enumerations and classes of the extension that Transformer Engine's Python looks up when it is imported.

Transformer Engine asserts at import that its own enumerations have the same members as the extension's.
"""

from enum import IntEnum
from typing import Any


class DType(IntEnum):
    """What a kernel's tensor holds (common/include/transformer_engine/transformer_engine.h)."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class _Named(type):
    """A class whose every public attribute is a number of its own: enumerations whose members nothing here counts."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        numbers = cls.__dict__["_numbers"]
        return numbers.setdefault(name, len(numbers))


def _enumeration(name: str) -> Any:
    return _Named(name, (), {"_numbers": {}})


NVTE_QKV_Layout = _enumeration("NVTE_QKV_Layout")
NVTE_QKV_Format = _enumeration("NVTE_QKV_Format")
NVTE_Bias_Type = _enumeration("NVTE_Bias_Type")
NVTE_Mask_Type = _enumeration("NVTE_Mask_Type")
NVTE_Softmax_Type = _enumeration("NVTE_Softmax_Type")
NVTEScalingMode = _enumeration("NVTEScalingMode")


class NVTE_Fused_Attn_Backend(IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class FP8FwdTensors(IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class NVTERoutingMapFormat(IntEnum):
    BYTEMAP = 0
    BITMAP_U8 = 1


NVTEQBHistogramMode = _enumeration("NVTEQBHistogramMode")


class CommOverlapType(IntEnum):
    RS = 0
    AG = 1


class FP8TensorMeta:
    """Scale and amax history of a module's tensors; Transformer Engine's Python sets the attributes."""


class CommOverlapHelper:
    """Named in annotations only: overlap through user buffers needs a GPU."""


class CommOverlap(CommOverlapHelper):
    pass


class CommOverlapP2P(CommOverlapHelper):
    pass
