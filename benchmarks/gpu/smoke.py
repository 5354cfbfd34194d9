"""The layer's cases one by one, and the tests that need a GPU."""

from __future__ import annotations

import sys
import traceback
from xml.etree import ElementTree

from benchmarks.gpu.process import last_line, run
from benchmarks.gpu.step import ROOT, Context, StepError, environment


def smoke(context: Context) -> None:
    """The cases of ``tests/gpu_cases.py`` that are marked for this, in bfloat16; one that fails stops no other."""
    from benchmarks.gpu.layers import start_megatron
    from tests.gpu_cases import CASES

    start_megatron()
    outcome: dict[str, str] = {}
    for name, case in CASES.items():
        if not case.smoke:
            continue
        reason = case.why_not()
        if reason:
            outcome[name] = f"not run: {reason}"
        else:
            try:
                case.check()
                outcome[name] = "ok"
            except Exception as error:
                traceback.print_exc()
                outcome[name] = f"failed: {type(error).__name__} {error}"[:300]
        context.note(cases=outcome)
    states = [text.partition(":")[0] for text in outcome.values()]
    context.note(says=f"{states.count('ok')} cases hold, {states.count('not run')} not run")
    if "failed" in states:
        raise StepError(f"{states.count('failed')} of {len(states)} cases failed.")


def tests(context: Context) -> None:
    """pytest on all files with tests for a GPU; on the CPU they are collected and skip themselves."""
    # Only files that have such tests: the others may import what a bare machine lacks.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    junit, log = context.out / "tests.xml", context.out / "pytest.log"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not training", "-p", "no:cacheprovider"]
    code = run(
        [*command, f"--junitxml={junit}", *files],
        environment(cpu=context.cpu),
        log,
        context.left,
        cwd=ROOT,
    )
    if not junit.exists():
        raise StepError(f"pytest ended with {code} and no report{last_line(log)}.")
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    counts["passed"] = counts["tests"] - bad - counts["skipped"]
    context.note(**counts, says=f"{counts['passed']} passed, {counts['skipped']} skipped")
    if code or bad:
        raise StepError(f"{bad} of {counts['tests']} tests failed (pytest ended with {code}).")
    if not context.cpu and not counts["passed"]:
        raise StepError("no test ran, although there is a GPU.")
