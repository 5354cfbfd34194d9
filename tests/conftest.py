"""For every test: one thread a process, and tests marked ``gpu`` are skipped where there is no CUDA device."""

import os

# Before torch is imported here or in a rank that a test spawns: two ranks on two cores must not fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.time_limit import pytest_addoption, pytest_configure  # noqa: F401  (hooks are found by name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without CUDA."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
