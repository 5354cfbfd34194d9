"""FP8 experts in numbers: the error of each recipe on one layer, and 200 steps of the demo's model in each.

    python benchmarks/fp8_numerics.py --output benchmarks/results/fp8_numerics

writes a table (.md), all figures (.json) and the loss curves (.png).  Runs that the JSON has are not run again, so an
interrupted start goes on.  On a CPU every recipe is emulated; with a GPU row-wise runs on torch's kernel.

The model, its batches and its learning rate are the demo's: four layers, 128 wide, eight experts of 256, sequences of
256; on one rank in the place of the demo's two.  Its text is collected from this machine.  All recipes of a seed have
the same initial weights and batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import fp8_errors
from benchmarks.gpu_check import device, versions
from megatron_dynmoe.demo.steps import (
    CORPUS_MEGABYTES,
    ITERATIONS,
    MODEL,
    ROUTING,
    TRAINING,
    VOCABULARY,
    flags,
    token_prefix,
    tool,
)

STEPS, LAST = ITERATIONS, 50
UNSAVED = {"eval-iters": 0, "train-iters": STEPS, "log-interval": 10, "save-interval": None}
# name -> flags; the second is what the others are compared with
RUNS = {
    "float32": [],
    "bfloat16": ["--bf16"],
    # What any difference in rounding grows to at this learning rate: a change of 2e-5 of it.
    "bfloat16, other lr": ["--bf16", "--lr", "6.00012e-3"],
    "float32, other lr": ["--lr", "6.00012e-3"],
    "delayed": ["--bf16", "--moe-fp8-recipe", "delayed"],
    "delayed, 16 steps": [
        *("--bf16", "--moe-fp8-recipe", "delayed", "--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max")
    ],
    "tensorwise": ["--bf16", "--moe-fp8-recipe", "tensorwise"],
    "blockwise": ["--bf16", "--moe-fp8-recipe", "blockwise"],
    "rowwise": ["--bf16", "--moe-fp8-recipe", "rowwise"],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path without ending")
    parser.add_argument("--work", type=Path, default=Path("fp8-numerics"), help="folder for text and logs")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once: %(default)s")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")
    path = options.output.with_suffix(".json")
    report = json.loads(path.read_text()) if path.exists() else {"curves": {}}
    cpu = not torch.cuda.is_available()
    report |= {"versions": versions(), "device": device(cpu=cpu), "date": time.strftime("%Y-%m-%d")}
    if len(report.get("errors", [])) == 0:
        report["errors"] = fp8_errors.rows(options.seeds, "cpu" if cpu else "cuda")
        write(path, report)
    prepare_text(options.work)
    train_all(report, path, options, cpu=cpu)
    write(path, report)
    options.output.with_suffix(".md").write_text("\n".join(page(report)) + "\n", encoding="utf-8")
    draw(report, options.output.with_suffix(".png"))
    return 0


def prepare_text(work: Path) -> None:
    """Collect and tokenize text, once."""
    prefix = token_prefix(work, "code", "train")
    if prefix.with_suffix(".idx").exists():
        return
    corpus, tokenizer = work / "corpus", work / "tokenizer"
    commands = [
        tool("collect_corpus", output=corpus, megabytes=CORPUS_MEGABYTES, overwrite=True),
        tool("train_tokenizer", corpus=corpus, output=tokenizer, vocab_size=VOCABULARY, overwrite=True),
        [
            *tool("preprocess_data", tokenizer_model=tokenizer.with_suffix(".model"), append_eod=True, overwrite=True),
            *flags({"input": corpus / "code" / "train-*", "output_prefix": prefix}),
        ],
    ]
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train_all(report: dict[str, Any], path: Path, options: argparse.Namespace, *, cpu: bool) -> None:
    """Every run of every seed that is not in ``report`` with the same command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_dynmoe.training.pretrain"])

    def one(name: str, seed: int) -> None:
        settings = [*model_flags(seed), *RUNS[name]]
        if not cpu and "--moe-fp8-recipe" in settings and name != "rowwise":
            settings.append("--moe-fp8-emulate")
        key, log = f"{name}/{seed}", options.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        if report["curves"].get(key, {}).get("flags") == settings:
            return
        metrics = log.with_suffix(".jsonl")
        metrics.unlink(missing_ok=True)
        start = time.monotonic()
        command = [*settings, *data_flags(options.work), "--moe-metrics-file", str(metrics)]
        process = context.Process(target=train, args=(command, str(log)))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{key} ended with {process.exitcode}; its output is in {log}.log.")
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses = {record["iteration"]: record["lm_loss"] for record in records if "lm_loss" in record}
        if len(losses) * TRAINING["log-interval"] != STEPS:
            raise SystemExit(f"{key} wrote {len(losses)} records into {metrics}; does another start write there?")
        report["curves"][key] = {"flags": settings, "seconds": round(time.monotonic() - start, 1), "loss": losses}
        write(path, report)
        print(f"{key}: {losses[STEPS]:.4f} after {STEPS} steps", flush=True)

    with ThreadPoolExecutor(options.jobs if cpu else 1) as pool:
        for done in [pool.submit(one, name, seed) for seed in range(options.seeds) for name in RUNS]:
            done.result()


def model_flags(seed: int) -> list[str]:
    """The training entry's flags of one seed."""
    training = {name: value for name, value in (TRAINING | UNSAVED).items() if value is not None}
    return flags(MODEL | ROUTING["dynamic-moe"]) + flags(training | {"seed": 1234 + seed})


def data_flags(work: Path) -> list[str]:
    """Where the text is."""
    words = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(work / "tokenizer.model")]
    return [
        *words,
        "--train-data-path",
        str(token_prefix(work, "code", "train")),
        "--data-cache-path",
        str(work / "cache"),
    ]


def train(argv: list[str], log: str) -> None:
    """One run, in a process of its own; its output goes to ``log``.log."""
    handle = os.open(f"{log}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    from megatron_dynmoe.training.pretrain import main as pretrain

    sys.exit(pretrain(argv))


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write(path: Path, report: dict[str, Any]) -> None:
    """Replace the JSON in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".json.part")
    whole.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def curve(report: dict[str, Any], name: str) -> list[dict[int, float]]:
    """The losses by iteration, one dictionary a seed."""
    found = [run["loss"] for key, run in sorted(report["curves"].items()) if key.rsplit("/", 1)[0] == name]
    return [{int(step): loss for step, loss in losses.items()} for losses in found]


def page(report: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    known = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    lines = ["# FP8 experts in numbers", "", f"{report['date']}, {report['device']}, {known}.", ""]
    lines += ["## One layer against float32", ""]
    lines += [f"`benchmarks/fp8_errors.py`: {sum(fp8_errors.SIZES)} rows of {fp8_errors.EXPERTS} experts, D "]
    lines[-1] += f"{fp8_errors.WIDTH}, F {fp8_errors.EXPERT_WIDTH}. Relative error in per cent, mean over seeds ± half "
    lines[-1] += "their range."
    lines += ["", *fp8_errors.table(report["errors"]), "", f"## {STEPS} steps", ""]
    lines += [f"Mean training loss of the last {LAST} steps, and its difference to bfloat16 with the same seed.", ""]
    lines += ["![loss curves](fp8_numerics.png)", ""]
    lines += ["| run | loss, mean over seeds | least and most | minus bfloat16: mean | of each seed |"]
    lines += ["|---|---:|---:|---:|---|"]
    base = [last(losses) for losses in curve(report, "bfloat16")]
    for name in RUNS:
        ends = [last(losses) for losses in curve(report, name)]
        gaps = [end - other for end, other in zip(ends, base, strict=True)]
        each = ", ".join(f"{gap:+.4f}" for gap in gaps)
        lines.append(
            f"| {name} | {statistics.mean(ends):.4f} | {min(ends):.4f}, {max(ends):.4f} | {statistics.mean(gaps):+.4f} "
            f"| {each} |"
        )
    return lines


def last(losses: dict[int, float]) -> float:
    """The mean loss of the last steps; a record is the mean of those since the one before."""
    return statistics.mean(loss for step, loss in losses.items() if step > STEPS - LAST)


def draw(report: dict[str, Any], path: Path) -> None:
    """Loss curves, and their difference to bfloat16: means over seeds, with their range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, difference) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    base = curve(report, "bfloat16")
    for number, name in enumerate(RUNS):
        runs = curve(report, name)
        steps, style = sorted(runs[0]), {"color": f"C{number}", "label": name}
        whole.plot(steps, [statistics.mean(run[step] for run in runs) for step in steps], **style)
        if name == "bfloat16":
            continue
        gaps = [[run[step] - other[step] for run, other in zip(runs, base, strict=True)] for step in steps]
        difference.plot(steps, [statistics.mean(gap) for gap in gaps], **style)
        difference.fill_between(
            steps, *zip(*[(min(gap), max(gap)) for gap in gaps], strict=True), alpha=0.1, color=style["color"]
        )
    whole.set(xlabel="step", ylabel="training loss", title="mean over seeds")
    difference.set(xlabel="step", ylabel="minus bfloat16", title="difference, with its range over seeds")
    difference.axhline(0, color="black", linewidth=0.5)
    whole.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
