"""A run that has passed and does not end, and a test that hangs, are ended by the suite's own limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
NEVER = "threading.Event().wait()"
CASES = {
    "in a thread that outlives the tests": f"threading.Thread(target=lambda: {NEVER}).start()",
    "in a test": NEVER,
    "in a test with signals ignored": f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {NEVER}",
}


@pytest.mark.parametrize("hang", CASES.values(), ids=CASES.keys())
def test_a_hang_is_ended_with_stacks(hang, tmp_path):
    (tmp_path / "test_hang.py").write_text(f"import signal, threading\n\ndef test_this_one():\n    {hang}\n")
    options = ["-p", "tests.time_limit", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    limit = ["-o", "suite_limit_minutes=0.08"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, *limit, str(tmp_path / "test_hang.py")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert "Timeout (0:00:04" in run.stderr and "threading.py" in run.stderr  # the stack of the thread that waits


def test_the_suite_has_a_limit(request):
    assert 20 < float(request.config.getini("suite_limit_minutes")) < 90
