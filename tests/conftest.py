"""For every test: one thread a process; tests marked ``gpu`` are skipped where there is no CUDA device.

tests/te is collected by a run of its own, which tests/test_te.py starts: there ``import transformer_engine`` works.
"""

import os
from pathlib import Path

# Before torch is imported here or in a rank that a test spawns: two ranks on two cores must not fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.time_limit import pytest_addoption, pytest_configure  # noqa: F401  (hooks are found by name)

TE = Path(__file__).parent / "te"


def _asked_of_te(config: pytest.Config) -> list[bool]:
    """Of each path on the command line whether it is in tests/te."""
    asked = (Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args)
    return [path.is_relative_to(TE) for path in asked]


def pytest_collection(session: pytest.Session) -> None:
    asked = _asked_of_te(session.config)
    if any(asked) and not all(asked):
        raise pytest.UsageError("tests/te needs a run of its own: Transformer Engine is in its processes alone.")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/te out of every run that asks for anything else."""
    return True if collection_path == TE and not any(_asked_of_te(config)) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without CUDA."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
