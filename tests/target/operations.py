"""Which operations of torch have a CUDA kernel in the lowest torch that is supported: ``operations.txt``.

python tests/target/operations.py   # where that torch is: checks the list, and prints what has no kernel
"""

from __future__ import annotations

from pathlib import Path

LIST = Path(__file__).parent / "operations.txt"


def known() -> set[str]:
    """Names of operations, as ``aten.add.Tensor``."""
    return {line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}


def without_cuda(names: set[str]) -> list[str]:
    """Those of ``names`` that the torch at hand cannot run on CUDA; it must be a build with CUDA, and needs no GPU.

    A kernel counts if it is registered for CUDA, or for every device in terms of other operations.
    """
    import torch

    def runs(name: str) -> bool:
        namespace, operation, overload = name.split(".")
        full = f"{namespace}::{operation}" + ("" if overload == "default" else f".{overload}")
        try:
            return torch._C._dispatch_has_computed_kernel_for_dispatch_key(full, "CUDA")
        except RuntimeError:  # there is no such operation
            return False

    return sorted(name for name in names if not runs(name))


if __name__ == "__main__":
    import torch

    print(f"torch {torch.__version__}: of {len(known())} operations without a CUDA kernel: {without_cuda(known())}")
