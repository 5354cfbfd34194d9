"""Stands in for Transformer Engine's compiled extension: its kernels in torch, for any device. See ``../../README.md``.

A name that is missing here is a kernel that nothing has needed yet: looking it up fails with a sentence.
"""

from transformer_engine_torch import activations, attention, gemm, names, norms, optimizer, quantize, recipe


def _publish(module: object) -> None:
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", module.__name__) == module.__name__:
            globals()[name] = value


for _module in (attention, gemm, names, norms, optimizer, quantize, recipe):
    _publish(_module)
globals().update(activations.ALL)


def get_cublasLt_version() -> int:
    """12.9: enough for FP8 on Hopper, and below 13.4, with which products read grouped tensors instead of lists."""
    return 120903


def get_num_cublas_streams() -> int:
    return 4


def get_cudnn_version() -> int:
    return 91200


def bulk_overlap_ag_with_external_gemm(*args: object) -> None:
    raise NotImplementedError("the stand-in has no overlap through user buffers")


def __getattr__(name: str) -> object:
    raise AttributeError(f"the stand-in for transformer_engine_torch has no {name}")
