"""The leg over Transformer Engine's own Python, tests/te, in a run of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.te.leg import LEG, start
from tests.te.start import packages_are_missing

ROOT = Path(__file__).resolve().parent.parent


def test_transformer_engine_leg(request) -> None:
    missing = packages_are_missing()
    if missing and os.environ.get("TE") != "required":
        pytest.skip(missing)
    assert not missing
    leg = request.config.stash.get(LEG, None) or start()
    code = leg.wait()
    print(leg.output())  # pytest shows it when the next line fails
    assert code == 0


def test_ordinary_tests_have_no_transformer_engine() -> None:
    names = ("transformer_engine", "transformer_engine_torch")
    find = f"from importlib.util import find_spec; print(*map(find_spec, {names}))"
    found = subprocess.run([sys.executable, "-c", find], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == "None None\n"
