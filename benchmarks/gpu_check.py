"""Does everything work on this GPU? Its tests, one bfloat16 training run of the demo's model, and the layer benchmark.

    make gpu-check                                    # GPU_PYTHON=python3 picks the Python that has torch with CUDA
    python benchmarks/gpu_check.py --json mine.json
    python benchmarks/gpu_check.py --cpu              # the same steps on the CPU: tries this script, measures nothing

It installs nothing and needs nothing but torch, megatron-core and pytest, from wheels on PYTHONPATH if need be; what
Transformer Engine adds is run where it is found. The steps are processes of their own; a step that fails does not stop
the others. Writes JSON with date and versions, exits with 0 if all went well and 1 if not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu_check.json"
ITERATIONS = 100
LOG_INTERVAL = 5
STEP_SECONDS = 900  # a step that takes longer hangs


class StepError(RuntimeError):
    """A step did not do what it should; one sentence."""


def main(argv: list[str] | None = None) -> int:
    """Run all steps, print the table, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help=f"result file (default: {RESULT.relative_to(ROOT)}; none with --cpu)")
    parser.add_argument("--cpu", action="store_true", help="try the script itself on a machine without a GPU")
    options = parser.parse_args(argv)
    reason = why_not(cpu=options.cpu)
    if reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1
    path = options.json or (None if options.cpu else RESULT)
    report = check(environment(cpu=options.cpu), cpu=options.cpu)
    print("\n" + table(report))
    if path:
        write_json(path, report)
        print(f"\nthe same as JSON: {path}")
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


def environment(*, cpu: bool) -> dict[str, str]:
    """The steps' environment: this checkout can be imported; one GPU, or none."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    visible = "" if cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}


def check(environment: dict[str, str], *, cpu: bool) -> dict[str, Any]:
    """Run the steps.

    Returns:
        what the JSON holds: date, versions, ``ok``, and for each step its result, or ``error`` in one sentence.
    """
    report: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    report |= {"versions": versions(), "device": device(cpu=cpu), "ok": True}
    steps: dict[str, Callable[..., dict[str, Any]]] = {"tests": tests, "training": training, "layer": layer}
    for number, (name, step) in enumerate(steps.items(), start=1):
        print(f"\n[{number}/{len(steps)}] {name}: {(step.__doc__ or '').splitlines()[0]}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
            try:
                report[name] = step(Path(folder), environment, cpu=cpu)
            except StepError as error:
                report[name], report["ok"] = {"error": str(error)}, False
                print(f"failed: {error}", flush=True)
        report[name]["seconds"] = round(time.monotonic() - start, 1)
    return report


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


# ---- the steps ------------------------------------------------------------------------------------------------------


def tests(folder: Path, environment: dict[str, str], *, cpu: bool) -> dict[str, Any]:
    """The tests that need a GPU."""
    # Only files that have such tests: the others may import what a bare machine lacks.
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    junit = folder / "junit.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
        *files,
    ]
    code = run(command, environment, folder / "log", show=True)
    if not junit.exists():
        raise StepError(f"pytest ended with {code} and no report{last_line(folder / 'log')}.")
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    bad = counts["failures"] + counts["errors"]
    if code or bad:
        raise StepError(f"{bad} of {counts['tests']} tests failed (pytest ended with {code}).")
    if not cpu and not counts["passed"]:
        raise StepError("no test ran, although there is a GPU.")
    return counts


def training(folder: Path, environment: dict[str, str], *, cpu: bool) -> dict[str, Any]:
    """The demo's model in bfloat16 on made-up data, one rank, 100 iterations."""
    metrics, log = folder / "metrics.jsonl", folder / "log"
    command = training_command(metrics)
    code = run(command, environment, log, watch=Progress(metrics))
    rows = read_rows(metrics)
    if code or not rows or rows[-1]["iteration"] != ITERATIONS:
        raise StepError(f"training ended with exit code {code}{last_line(log)}.")
    start, end = rows[0]["lm_loss"], rows[-1]["lm_loss"]
    if not end < start / 2:
        raise StepError(f"the loss went from {start:.3f} to {end:.3f}; on this data it should at least halve.")
    return {
        "iterations": ITERATIONS,
        "loss_start": start,
        "loss_end": end,
        "experts_per_token_start": rows[0]["experts_per_token"],
        "experts_per_token_end": rows[-1]["experts_per_token"],
        # the first interval includes start-up
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows[1:]),
    }


def training_command(metrics: Path) -> list[str]:
    """torchrun with the demo's flags; what follows them wins."""
    sys.path.insert(0, str(ROOT))
    from megatron_dynmoe.demo.steps import MODEL, ROUTING, TRAINING, flags

    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    words += [str(ROOT / "examples" / "pretrain_dynmoe.py"), *flags(MODEL | ROUTING["dynamic-moe"]), *flags(TRAINING)]
    words += [
        "--bf16",
        "--mock-data",
        "--split",
        "100,0,0",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "4095",
    ]
    words += ["--train-iters", str(ITERATIONS), "--log-interval", str(LOG_INTERVAL), "--eval-iters", "0"]
    return [*words, "--moe-token-dispatcher-type", "alltoall", "--moe-metrics-file", str(metrics)]


def layer(folder: Path, environment: dict[str, str], *, cpu: bool) -> dict[str, Any]:
    """Forward and backward of one layer, beside megatron-core's own."""
    result = folder / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "layer_quick.py"), "--json", str(result)]
    code = run(command, environment, folder / "log")
    if code or not result.exists():
        raise StepError(f"the benchmark ended with exit code {code}{last_line(folder / 'log')}.")
    return {"rows": json.loads(result.read_text(encoding="utf-8"))}


# ---- processes and files --------------------------------------------------------------------------------------------


def run(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    *,
    show: bool = False,
    watch: Callable[[], None] | None = None,
) -> int:
    """Run a step's command with its output in ``log``; ended with this program if that is interrupted.

    Args:
        show: repeat the output here.
        watch: called every second, and once at the end.
    """
    with (
        log.open("wb") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT) as child,
    ):
        deadline = time.monotonic() + STEP_SECONDS
        try:
            while child.poll() is None:
                time.sleep(1)
                if watch:
                    watch()
                if time.monotonic() > deadline:
                    raise StepError(f"it was ended after {STEP_SECONDS} seconds{last_line(log)}.")
        except BaseException:
            end(child)
            raise
    if show:
        print(log.read_text(errors="replace").rstrip(), flush=True)
    if watch:
        watch()
    return child.returncode


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask a command to end (torchrun passes it on to its rank); make it if it does not."""
    child.terminate()
    try:
        child.wait(timeout=45)  # torchrun gives its ranks 30 s
    except subprocess.TimeoutExpired:
        child.kill()


class Progress:
    """Prints a line for every interval that a training has written since the last call."""

    def __init__(self, metrics: Path) -> None:
        self.metrics, self.printed = metrics, 0

    def __call__(self) -> None:
        rows = read_rows(self.metrics)
        for row in rows[self.printed :]:
            print(
                f"  iteration {row['iteration']:3}/{ITERATIONS}  loss {row['lm_loss']:.3f}  "
                f"{row['experts_per_token']:.2f} experts/token  {row['tokens_per_second']:.0f} tokens/s",
                flush=True,
            )
        self.printed = len(rows)


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The intervals of a training, whole lines only."""
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return [row for row in map(json.loads, lines) if "lm_loss" in row]


def last_line(log: Path) -> str:
    """The last error line of a log, else its last line, in brackets."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if ("Error" in line and "ChildFailedError" not in line) or line.startswith("error: ")
    ]
    return f" ({(errors or lines)[-1][:300]})" if lines else ""


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write beside, then replace: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def table(report: dict[str, Any]) -> str:
    """The report for people, a line a fact."""
    known = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    rows = [("device", report["device"]), ("date", report["date"]), ("versions", known)]
    tests, training, layer = (report[name] for name in ("tests", "training", "layer"))
    failed = {name: step["error"] for name, step in report.items() if isinstance(step, dict) and "error" in step}
    if "tests" not in failed:
        rows.append(("tests", f"{tests['passed']} passed, {tests['skipped']} skipped"))
    if "training" not in failed:
        loss = f"loss {training['loss_start']:.3f} -> {training['loss_end']:.3f}"
        rows.append(("training, bf16", f"{loss}, {training['tokens_per_second']:.0f} tokens/s"))
    if "layer" not in failed:
        for row in layer["rows"]:
            numbers = f"{row['milliseconds']:.3f} ms, {row['experts_per_token']:.2f} experts/token"
            rows.append((row["layer"], f"{numbers}, {row['tflops']:.2f} TFLOP/s"))
    rows += [(f"{name} FAILED", sentence) for name, sentence in failed.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
