"""The leg over Transformer Engine's own Python, tests/te, in a run of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.te.start import packages_are_missing

ROOT = Path(__file__).resolve().parent.parent


def test_transformer_engine_leg() -> None:
    missing = packages_are_missing()
    if missing and os.environ.get("TE") != "required":
        pytest.skip(missing)
    assert not missing
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-o", "suite_limit_minutes=15", str(ROOT / "tests" / "te")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:])  # pytest shows it when the next line fails
    assert done.returncode == 0


def test_ordinary_tests_have_no_transformer_engine() -> None:
    names = ("transformer_engine", "transformer_engine_torch")
    find = f"from importlib.util import find_spec; print(*map(find_spec, {names}))"
    found = subprocess.run([sys.executable, "-c", find], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == "None None\n"
