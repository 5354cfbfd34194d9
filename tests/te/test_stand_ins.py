"""The stand-ins for Transformer Engine's kernels compute what they should, as torch's autograd and its own code say."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from tests.te import kernels


@pytest.mark.parametrize("check", kernels.CHECKS, ids=lambda check: check.__name__)
def test_against_torch_or_transformer_engine(check, tmp_path):
    ranks.call(check, ranks=1, folder=tmp_path)


def test_permutation_against_the_interpreted_kernels():
    command = [sys.executable, "-m", "tests.te.interpret"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
