"""Preprocessing that is interrupted, or whose workers are killed, ends: in time, and with nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
INTERRUPTIONS = 20
END_SECONDS = 10


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """Preprocessing with two workers that takes far longer than any test waits; results are much larger than a pipe."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("endless")
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    shard = folder / "0.jsonl"
    shard.write_text("".join(json.dumps({"text": "a" + " b" * (i % 700)}) + "\n" for i in range(4_000)))
    names = [str(shard)]
    for number in range(1, 40):  # the same bytes under other names
        os.link(shard, folder / f"{number}.jsonl")
        names.append(str(folder / f"{number}.jsonl"))
    tool = str(REPOSITORY / "tools" / "preprocess_data.py")
    options = ["--tokenizer-model", str(folder / "tokenizer.json"), "--workers", "2"]
    return [sys.executable, tool, *options, "--input", *names]


def start(command: list[str], prefix: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, "--output-prefix", str(prefix)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def session(leader: int) -> list[int]:
    """Living processes of a session; an ended one may wait for a container's init to collect it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def ends_alone(child: subprocess.Popen) -> str:
    """What it printed; fails if it, or one of its processes, is there after ten seconds."""
    deadline = time.monotonic() + END_SECONDS
    try:
        output, _ = child.communicate(timeout=END_SECONDS)
        while (left := session(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"processes {left} are still there after {END_SECONDS} s:\n{output}"
        return output
    finally:
        for pid in session(child.pid):
            os.kill(pid, signal.SIGKILL)
        child.wait()


def test_twenty_interruptions_at_random_moments(command, tmp_path):
    moments = random.Random(3)
    for number in range(INTERRUPTIONS):
        signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
        child = start(command, tmp_path / "out")
        time.sleep(moments.uniform(0.3, 2.5))
        # Ctrl-C reaches every process of the terminal; a scheduler may send SIGTERM to all, or to the first alone
        (os.killpg if number % 4 < 2 else os.kill)(child.pid, signum)
        output = ends_alone(child)
        # The earliest meet an interpreter that has not come to the tool's first line.
        assert child.returncode in (130, 143, -signum, 1), output
        assert list(tmp_path.iterdir()) == [], output
        # what the workers do about it is their parent's to say
        assert "spawn_main" not in output and "workers.py" not in output, output


def test_a_worker_killed_while_it_writes(command, tmp_path):
    child = start(command, tmp_path / "out")
    while not (workers := [pid for pid in session(child.pid) if is_worker(pid)]) or not list(tmp_path.glob("out.bin*")):
        assert child.poll() is None
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    output = ends_alone(child)
    assert child.returncode == 1 and "a preprocessing worker died (exit code -9" in output
    assert list(tmp_path.iterdir()) == []


def is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
