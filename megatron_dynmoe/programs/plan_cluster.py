"""Plan a training run on paper: memory, rows and bytes on each link, and step time.

    dynmoe-plan dynamic_moe_24l ... --gpus 8 32 256       what each script's run needs and does, as expected
    dynmoe-plan --model FILE --nodes 2 ... --mean-k 2     every TP x PP x EP layout of a model

The first asks the pretrain.sh that lies beside the folder of the files what it would run (DRY_RUN=1), and plans with
those flags; flags of your own come after --, settings as for the script (FP8=1 dynmoe-plan ...).
The second takes the model from Megatron's flags, here or in the file --model names (what is given here wins), and the
routing from --metrics-file of a run, or --mean-k, uniform or with --zipf-exponent.
See docs/cluster.md for what is counted and what is not.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.planning import Cluster, Histogram, PlanError, plan_all, to_markdown
from megatron_dynmoe.planning.expect import Expectation, expect, row_of, table_of
from megatron_dynmoe.planning.flags import add_model_flags, model_of, read_flags, words_of
from megatron_dynmoe.programs.command import command_parser, examples

EXAMPLE = """\
dynmoe-plan dynamic_moe_24l dynmoe_24l --gpus 8 32
dynmoe-plan --model dynamic_moe_24l --bf16 --vocab-size 32000 --micro-batch-size 8 --global-batch-size 512 \\
    --nodes 4 --nvlink-gb-s 300 --network-gb-s 40 --tflops 350 --gpu-memory-gb 80 --mean-k 2"""


def model_file(word: str) -> Path:
    """A model's file, given by its path or by the name of one of ours."""
    path, ours = Path(word), examples() / "models" / f"{word}.args"
    return ours if ours.is_file() and not path.exists() else path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(__doc__, example=EXAMPLE, allow_abbrev=False)
    result.add_argument(
        "--model", type=model_file, help="Megatron's flags in a file, or a .json object of their names; or MODEL"
    )
    add_model_flags(result)
    cluster = result.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=int)
    cluster.add_argument("--gpus-per-node", type=int, default=8)
    cluster.add_argument("--nvlink-gb-s", type=float, help="GB/s a GPU sends inside its node")
    cluster.add_argument("--network-gb-s", type=float, help="GB/s a GPU sends to other nodes")
    cluster.add_argument("--tflops", type=float, help="TFLOP/s a GPU achieves in the model's GEMMs")
    cluster.add_argument("--gpu-memory-gb", type=float)
    ours = ", ".join(sorted(path.stem for path in (examples() / "models").glob("*.args")))
    scripts = result.add_argument_group("scripts; the cluster is then of H100s, as far as nothing else is said")
    scripts.add_argument("files", nargs="*", type=model_file, metavar="MODEL", help=f"files, or names of ours: {ours}")
    scripts.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 256], help="numbers of GPUs")
    routing = result.add_argument_group("routing")
    routing.add_argument("--metrics-file", type=Path, help="what a run wrote with --moe-metrics-file")
    routing.add_argument("--zipf-exponent", type=float, help="popularity of experts; 0, the default, is uniform")
    output = result.add_argument_group("output")
    output.add_argument("--format", choices=("markdown", "json"), default="markdown")
    output.add_argument("--output", type=Path, help="default: standard output")
    output.add_argument("--top", type=int, default=20, help="layouts in the Markdown tables; JSON has all of them")
    return result


def histogram_of(args: argparse.Namespace, *, experts: int, moe_layers: int) -> Histogram:
    """The routing that the flags name."""
    if (args.metrics_file is None) == (args.mean_k is None):
        raise PlanError("the routing is one of --metrics-file (of a run) and --mean-k (assumed); give one of the two.")
    if args.metrics_file is None:
        return Histogram.zipf(experts=experts, mean_k=args.mean_k, exponent=args.zipf_exponent or 0.0)
    if args.zipf_exponent is not None:
        raise PlanError("--zipf-exponent goes with --mean-k; a --metrics-file says itself how loads differ.")
    return Histogram.measured(args.metrics_file, experts=experts, moe_layers=moe_layers)


# Assumed where nothing is said: what a GPU of a DGX H100 sends by NVLink and by its one 400 Gb/s network card, in one
# direction, after protocols; a good third of the data sheet's 989 TFLOP/s, as GEMMs of this size get in bfloat16.
H100 = {"nvlink_gb_s": 300.0, "network_gb_s": 40.0, "tflops": 350.0, "gpu_memory_gb": 80.0}


def cluster_of(args: argparse.Namespace, nodes: int, gpus: int) -> Cluster:
    """Nodes of the kind that the flags describe."""
    given = {name: getattr(args, name) for name in H100}
    nvlink, network, tflops, memory = (H100[name] if value is None else value for name, value in given.items())
    return Cluster(
        nodes=nodes, gpus=gpus, nvlink=nvlink * 1e9, network=network * 1e9, flops=tflops * 1e12, memory=memory * 1e9
    )


def script_words(file: Path, nodes: int, gpus: int, own: Sequence[str] = ()) -> list[str]:
    """The flags that pretrain.sh gives to the training entry for a model file on so many GPUs.

    Raises:
        PlanError: it refuses, or there is none.
    """
    script = file.resolve().parent.parent / "pretrain.sh"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.idx").touch()
        (folder / "tokenizer.model").touch()
        given = {"DATA": f"{folder}/text", "TOKENIZER": f"{folder}/tokenizer.model", "SAVE": f"{folder}/save"}
        given |= {"DRY_RUN": "1", "NNODES": str(nodes), "GPUS": str(gpus)}
        command = ["bash", str(script), file.stem, *own]
        done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False)
    words = shlex.split(done.stdout)
    entry = next((place for place, word in enumerate(words) if word.endswith("pretrain_dynmoe.py")), None)
    if done.returncode or entry is None:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise PlanError(f"{script} refused {file.stem} on {nodes * gpus} GPUs: {reason[0]}")
    return words[entry + 1 :]


def expect_script(args: argparse.Namespace, file: Path, world: int) -> tuple[Cluster, Expectation | PlanError]:
    """What is expected of one script's run on ``world`` GPUs, or why it would be refused."""
    gpus = min(world, args.gpus_per_node)
    if world < 1 or world % gpus:
        raise PlanError(f"--gpus is {world}; accepted: less than a node of {gpus}, or whole nodes.")
    cluster = cluster_of(args, world // gpus, gpus)
    try:
        for_plan = words_of(file.read_text(encoding="utf-8"))
        return cluster, expect([*for_plan, *script_words(file, cluster.nodes, gpus, args.own)], cluster)
    except PlanError as error:
        return cluster, error


def report_scripts(args: argparse.Namespace) -> str:
    """The table of all model files and numbers of GPUs."""
    cases = [(file, world) for file in args.files for world in args.gpus]
    with ThreadPoolExecutor(4) as pool:  # a script's run is waiting, for the most part
        found = list(pool.map(lambda case: expect_script(args, *case), cases))
    rows = [row_of(file.stem, *result) for (file, _), result in zip(cases, found, strict=True)]
    return table_of(rows)


def report(args: argparse.Namespace) -> str:
    """The plan as text."""
    if args.files:
        return report_scripts(args)
    for name in ("nodes", *H100):
        if getattr(args, name) is None:
            raise PlanError(f"--{name.replace('_', '-')} is missing; give the number, as --help says.")
    model = model_of(args)
    if args.top < 1:
        raise PlanError(f"--top is {args.top}; accepted: at least 1.")
    cluster = cluster_of(args, args.nodes, args.gpus_per_node)
    histogram = histogram_of(args, experts=model.experts, moe_layers=sum(model.moe))
    sharded = args.use_distributed_optimizer
    records = plan_all(model, cluster, histogram, unit=model.routing.dispatch_unit, distributed_optimizer=sharded)
    if args.format == "json":
        return json.dumps({"routing": histogram.source, "layouts": records}, indent=1) + "\n"
    title = f"{cluster.nodes} x {cluster.gpus} GPUs; routing: {histogram.source}"
    return to_markdown(records, title=title, most=args.top)


def write(text: str, path: Path | None) -> None:
    """To a file, whole or not at all, or to standard output."""
    if path is None:
        sys.stdout.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@one_sentence("plan_cluster")
def main(argv: list[str] | None = None) -> int:
    """Parse, plan, report; 1 with one sentence on stderr."""
    # What the file says has to be known before the rest is parsed, so that the rest wins.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", type=model_file)
    first.add_argument("--metrics-file")
    known, _ = first.parse_known_args(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    defaults = read_flags(known.model) if known.model else None
    if defaults and known.metrics_file:
        defaults.mean_k = None  # what a run measured wins over what the model's file assumes
    args = parser().parse_args(words[:cut], defaults)
    args.own = words[cut + 1 :]
    write(report(args), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
