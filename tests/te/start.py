"""Import Transformer Engine's own Python over the stand-ins, on a machine without a GPU.

    from tests.te import start
    start.transformer_engine()      # before megatron is imported, which asks then whether Transformer Engine is there

The packages lie in a folder of their own (``.venv/te``), so that nothing else ever finds them.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = Path(os.environ.get("TE_PACKAGES", ROOT / ".venv" / "te"))


def packages_are_missing() -> str | None:
    """One sentence where the packages are not installed at the versions of requirements.txt."""
    wanted = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").split("\n")
    for name, _, version in (line.partition("==") for line in wanted if "==" in line):
        if not (PACKAGES / f"{name}-{version}.dist-info").is_dir():
            return f"tests/te needs {name} {version} in {PACKAGES}; `tools/setup_venv.sh te` installs it."
    return None


def transformer_engine(*, triton: bool = False) -> None:
    """Make ``import transformer_engine.pytorch`` work; ``transformer_engine_torch`` is the stand-in.

    Args:
        triton: keep the launchers of Transformer Engine's Triton kernels instead of what stands in for them.
    """
    sys.path[:0] = [str(Path(__file__).parent / "stand_in"), str(PACKAGES)]
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its compiled libraries are not looked for
    with warnings.catch_warnings():
        # the first import stops where the extension would be loaded, says so, and leaves everything above it loaded
        warnings.simplefilter("ignore", RuntimeWarning)
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine").pytorch = importlib.import_module("transformer_engine.pytorch")
    if not triton:
        _replace_triton()


def _replace_triton() -> None:
    from transformer_engine.pytorch.triton import permutation
    from transformer_engine_torch.permutation import LAUNCHERS

    for launcher in LAUNCHERS:
        setattr(permutation, launcher.__name__, launcher)
