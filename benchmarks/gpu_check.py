"""Does everything work on this GPU? Eleven steps in nine minutes, what decides most first, each within its bound.

    make gpu-check                                    # GPU_PYTHON=python3 picks the Python that has torch with CUDA
    python benchmarks/gpu_check.py --out results      # a file a step, written as it goes, and report.json of them all
    python benchmarks/gpu_check.py --steps smoke,fp8
    python benchmarks/gpu_check.py --cpu              # the same code at toy sizes on the CPU: measures nothing

It installs nothing and needs nothing but torch, megatron-core and pytest, from wheels on PYTHONPATH if need be; what
Transformer Engine adds is run where it is found.  Every step is a process of its own, ended with all its descendants at
its bound; one that fails stops no other.  Exits with 0 if nothing failed and 1 if something did.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu.process import Ended, last_line, run, write_json
from benchmarks.gpu.step import PATIENCE, ROOT, STEPS, TOTAL, Step, environment

RESULTS = ROOT / "benchmarks" / "results" / "gpu_check"


def main(argv: list[str] | None = None) -> int:
    """Run the steps, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    folder = f"$OUT, or {RESULTS.relative_to(ROOT)}; with --cpu one that is removed"
    parser.add_argument("--out", type=Path, help=f"folder for results (default: {folder})")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of these, in this order: {', '.join(STEPS)}")
    parser.add_argument("--cpu", action="store_true", help="toy sizes on the CPU, with more time for each step")
    parser.add_argument("--preload", metavar="MODULE", help="what each process imports first: tests.te.preload, say")
    options = parser.parse_args(argv)
    names = [name for name in options.steps.split(",") if name]
    unknown = sorted(set(names) - set(STEPS))
    if unknown or not names:
        parser.error(f"--steps is {options.steps!r}; accepted: names of {', '.join(STEPS)}, with commas between them.")
    reason = why_not(cpu=options.cpu)
    if reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1
    given = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        out = (given or (Path(scratch) if options.cpu else RESULTS)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        steps = [step for step in STEPS.values() if step.name in names]
        report = check(steps, out, cpu=options.cpu, preload=options.preload)
        print("\n" + table(report))
        if given or not options.cpu:
            print(f"\nall of it: {out}")
    return 0 if report["ok"] else 1


def why_not(*, cpu: bool) -> str | None:
    """Why the check cannot start on this machine, in one sentence; ``None`` if it can."""
    absent = [name for name in ("torch", "megatron.core", "pytest") if not found(name)]
    if absent:
        return (
            f"{sys.executable} has no {', '.join(absent)}; name another Python with GPU_PYTHON, or extend PYTHONPATH."
        )
    import torch

    if not cpu and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device here; --cpu tries the script itself without one."
    return None


def found(module: str) -> bool:
    """Whether ``module`` can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def check(steps: list[Step], out: Path, *, cpu: bool, preload: str | None = None) -> dict[str, Any]:
    """Run the steps; ``report.json`` is whole after each.

    Returns:
        what it holds: date, versions, ``ok``, and under ``steps`` each one's facts, state, seconds and bound.
    """
    report: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    report |= {"versions": versions(), "device": device(cpu=cpu), "preload": preload, "ok": True, "steps": {}}
    patience = PATIENCE if cpu else 1
    end = time.monotonic() + TOTAL * patience
    for number, step in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {step.name}: {step.says}", flush=True)
        start = time.monotonic()
        limit = min(step.seconds * patience, end - start)
        result = one(step, out, limit, cpu=cpu, preload=preload)
        result |= {"seconds": round(time.monotonic() - start, 1), "bound": round(limit, 1)}
        report["steps"][step.name] = result
        report["ok"] &= result["state"] in ("ok", "not run")
        write_json(out / "report.json", report)
        print(f"      {line(result)}", flush=True)
    return report


def one(step: Step, out: Path, limit: float, *, cpu: bool, preload: str | None) -> dict[str, Any]:
    """Run one step in a process of its own; what it had noted when it was ended is kept."""
    result, log = out / f"{step.name}.json", out / f"{step.name}.log"
    result.unlink(missing_ok=True)
    if limit < 1:
        return {"state": "failed", "error": f"the {TOTAL} seconds for all steps were over."}
    command = [sys.executable, "-m", "benchmarks.gpu", step.name, "--out", str(out), "--seconds", str(limit)]
    ended = None
    try:
        code = run([*command, *(["--cpu"] if cpu else [])], environment(cpu=cpu, preload=preload), log, limit, cwd=ROOT)
        ended = f"its process ended with {code}{last_line(log)}."
    except Ended as error:
        ended = str(error)
    facts = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"state": "running"}
    if facts["state"] == "running":
        facts |= {"state": "failed", "error": ended}
        write_json(result, facts)
    return facts


def versions() -> dict[str, str | None]:
    """What the numbers depend on; ``None`` for what is absent."""
    import torch

    names = ("megatron-core", "transformer_engine", "triton", "numpy")
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda} | {
        name: importlib.metadata.version(name) if installed(name) else None for name in names
    }


def installed(distribution: str) -> bool:
    """Whether a distribution of this name is there."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def device(*, cpu: bool) -> str:
    """The GPU's name, or the CPU's architecture."""
    import torch

    return f"cpu ({platform.machine()})" if cpu else torch.cuda.get_device_name(0)


def line(result: dict[str, Any]) -> str:
    """What came of a step, for people."""
    said = "; ".join(filter(None, [result.get("says"), result.get("error")]))
    return f"{result['state']:8} {result['seconds']:6.1f} of {result['bound']:.0f} s  {said}".rstrip()


def table(report: dict[str, Any]) -> str:
    """The report for people, a line a step, and then the rows of those that have a table."""
    known = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    rows = [("device", report["device"]), ("date", report["date"]), ("versions", known)]
    rows += [(name, line(result)) for name, result in report["steps"].items()]
    for name, result in report["steps"].items():
        rows += [(f"  {name}", text) for text in result.get("table", [])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


if __name__ == "__main__":
    # so that the step at hand is ended too, with what it started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
