"""The memory guard keeps the promise that its benchmark prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script(name, *argv):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / name), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_memory_guard_keeps_its_promise(tmp_path):
    file = tmp_path / "guard.json"
    script("memory_guard.py", "--tokens", 128, "--width", 64, "--expert-width", 96, "--bounds", 2, 1, "--json", file)
    free, two, one = json.loads(file.read_text())
    assert free["cut"] == 0 and two["rows"] == 256 and one["rows"] == 128
    assert one["peak_bytes"] < two["peak_bytes"] < free["peak_bytes"]
