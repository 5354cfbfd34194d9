"""Run the example scripts with a few lines of shell in place of ``torchrun``, ``srun`` and ``scontrol``.

The stand-ins write down how they were called.
"""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODELS = sorted(file.stem for file in (EXAMPLES / "models").glob("*.args"))

# Writes its arguments, one a line, and the checkpoint that the test wants a training to leave.
TORCHRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$STUB/torchrun.$$" && mv "$STUB/torchrun.$$" "$STUB/torchrun.args" # two nodes write it
[ -z "$STUB_SAVES" ] || { mkdir -p "$SAVE"; echo "$STUB_SAVES" >"$SAVE/latest_checkpointed_iteration.txt"; }
exit "${STUB_CODE:-0}"
"""
# Two nodes with a task each, or as many tasks as it is told; its exit code is the highest of theirs.
SRUN = """#!/bin/bash
tasks=2 each=1 code=0
while [[ $1 == --* ]]; do
    echo "$1" >>"$STUB/srun.options"
    case $1 in --ntasks=*) tasks=${1#*=} ;; --ntasks-per-node=*) each=${1#*=} ;; esac
    shift
done
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % each)) SLURM_NTASKS=$tasks "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || { ended=$?; ((ended <= code)) || code=$ended; }; done
exit $code
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf '127.0.0.1\\nnode8\\n' || echo "$@" >>"$STUB/scontrol.calls"
"""


@pytest.fixture(name="stub")
def stand_ins(tmp_path) -> Path:
    """A folder with the stand-ins, an indexed dataset's name and a tokenizer's."""
    for name, text in (("torchrun", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "text.idx").touch()
    (tmp_path / "tokenizer.model").touch()
    return tmp_path


def stand_in_environment(stub: Path) -> dict[str, str]:
    torchrun, path = str(stub / "torchrun"), f"{stub}:{os.environ['PATH']}"
    return {"STUB": str(stub), "TORCHRUN": torchrun, "RESTARTS": "0", "PATH": path}


def run(script: str, stub: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    given = os.environ | stand_in_environment(stub) | environment
    command = ["bash", str(EXAMPLES / script), *flags]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)


def settings(stub: Path) -> dict[str, str]:
    return {
        "DATA": f"0.7 {stub}/text 0.3 {stub}/text",
        "TOKENIZER": str(stub / "tokenizer.model"),
        "SAVE": str(stub / "save"),
    }


def torchrun_args(stub: Path) -> tuple[list[str], list[str]]:
    """What torchrun was called with: its own arguments, and those of the training entry."""
    words = (stub / "torchrun.args").read_text().splitlines()
    entry = words.index(str(EXAMPLES / "pretrain_dynmoe.py"))
    return words[:entry], words[entry + 1 :]


def dry_run(script: str, stub: Path, *flags: str, **environment: str) -> list[str]:
    """The flags of the training entry that the script would start."""
    done = run(script, stub, *flags, **(settings(stub) | {"DRY_RUN": "1"} | environment))
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    return words[words.index(str(EXAMPLES / "pretrain_dynmoe.py")) + 1 :]


def value_of(words: list[str], flag: str) -> str:
    """What follows the last ``flag`` in ``words``: the one that wins."""
    return words[len(words) - words[::-1].index(flag)]


def contains(words: list[str], part: list[str]) -> bool:
    """Whether ``part`` stands in ``words`` in one piece."""
    return any(words[i : i + len(part)] == part for i in range(len(words)))


def model_flags(model: str) -> list[str]:
    return shlex.split((EXAMPLES / "models" / f"{model}.args").read_text(encoding="utf-8"), comments=True)


def slurm_environment(stub: Path) -> dict[str, str]:
    """What slurm.sh finds in a job on two nodes, with the stand-ins."""
    return (
        stand_in_environment(stub)
        | settings(stub)
        | {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_SUBMIT_DIR": str(EXAMPLES.parent),
            "TRAIN_ITERS": "100",
        }
    )


def slurm(stub: Path, flags: Sequence[str] = ("dynmoe_24l",), **extra: str) -> subprocess.CompletedProcess:
    return run("slurm.sh", stub, *flags, **(slurm_environment(stub) | extra))


def requeued(stub: Path) -> bool:
    calls = stub / "scontrol.calls"
    return calls.exists() and calls.read_text() == "requeue 123456\n"
