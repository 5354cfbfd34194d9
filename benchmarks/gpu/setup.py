"""The first step: what is here."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.gpu.step import ROOT, Context, StepError


def setup(context: Context) -> None:
    """The doctor's table and nvidia-smi's, each in a file."""
    doctor = _text([sys.executable, "-m", "megatron_dynmoe.doctor"], context)
    (context.out / "doctor.txt").write_text(doctor.stdout + doctor.stderr)
    context.note(doctor=(doctor.stdout.strip().splitlines() or ["nothing"])[-1])
    if not context.cpu:
        if shutil.which("nvidia-smi") is None:
            context.note(gpu="there is no nvidia-smi")
        else:
            (context.out / "nvidia-smi.txt").write_text(_text(["nvidia-smi"], context).stdout)
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
            context.note(gpu=_text(query, context).stdout.strip().splitlines())
    if doctor.returncode:
        raise StepError(f"the doctor says: {context.facts['doctor']}")
    context.note(says=context.facts["doctor"])


def _text(command: list[str], context: Context) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, context.left))
