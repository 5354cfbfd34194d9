"""For every test: one thread a process, and tests that need devices or libraries that are not here skip themselves.

tests/te is collected by a run of its own, which tests/test_te.py starts: there ``import transformer_engine`` works.
"""

import os
from importlib.util import find_spec
from pathlib import Path

# Before torch is imported here or in a rank that a test spawns: two ranks on two cores must not fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.te import leg
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


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the run of tests/te beside the others."""
    if not session.config.option.collectonly:
        leg.start_beside(session)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End it, if it is not done."""
    leg.end_with(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked for devices or libraries that are missing; wait last for the run of tests/te."""
    items.sort(key=lambda item: item.path.name == "test_te.py")  # stable: the others stay in their order
    for marker, missing in (("gpu", _no_gpu), ("deepep", _no_deepep), ("hybridep", _no_hybridep)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing() if marked else None
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=f"needs {reason}"))


def _no_gpu(devices: int = 1) -> str | None:
    import torch

    if torch.cuda.device_count() >= devices:
        return None
    return "a CUDA device" if devices == 1 else f"{devices} CUDA devices"


def _no_deepep() -> str | None:
    return _no_gpu(2) or (None if find_spec("deep_ep") else "DeepEP")


def _no_hybridep() -> str | None:
    missing = _no_deepep()
    if missing is None:
        import deep_ep

        missing = None if hasattr(deep_ep, "HybridEPBuffer") else "DeepEP's branch hybrid-ep"
    return missing
