"""torchrun's own restarts: a rank is killed, and training goes on from the last checkpoint to its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.layouts import flags

REPOSITORY = Path(__file__).parents[2]
LAST = 300


def rank_1_of(launcher: int) -> int:
    """Process number of the second rank."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError("torchrun has no rank 1")


def test_torchrun_restarts_from_the_last_checkpoint(tmp_path):
    save = tmp_path / "save"
    tracker = save / "latest_checkpointed_iteration.txt"
    saving = ["--save", str(save), "--load", str(save), "--save-interval", "20", "--train-iters", str(LAST)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(REPOSITORY / "examples" / "pretrain_dynmoe.py")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen([*command, *flags("dp2", *saving)], stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not tracker.exists():
            assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        os.kill(rank_1_of(launcher.pid), signal.SIGKILL)
        assert launcher.wait(timeout=150) == 0, log.read_text()[-3000:]
    finally:
        launcher.kill()
    said = log.read_text()
    assert said.count("a collective lost a rank") == 1 and said.count("successfully loaded checkpoint") == 1
    assert tracker.read_text() == str(LAST)
