"""The commands of the demo, and the sizes of its model.

The model is as small as a laptop needs; where there are GPUs the same commands use them (NCCL, bfloat16). Pretraining
is cut in two: the first half saves a distributed checkpoint and ends, the second is a new torchrun that resumes from
it.

Both held-out losses are of the same batches: ``--eval-interval`` is longer than the training, so that each of the two
evaluations (of the untrained model and after the last iteration) is the first of its process and reads the held-out
text from its start.
"""

import json
import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_dynmoe.errors import UserError

SUBSETS = ("code", "docs")
PROMPTS = ("def read_lines(path):\n", "The following options")  # one for each subset

CORPUS_MEGABYTES = 24
VOCABULARY = 4096
ITERATIONS = 200
SAVED_AT = 100

MODEL: dict[str, Any] = {
    "num-layers": 4,
    "hidden-size": 128,
    "ffn-hidden-size": 352,
    "num-attention-heads": 4,
    "seq-length": 256,
    "max-position-embeddings": 256,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "attention-dropout": 0,
    "hidden-dropout": 0,
    "moe-ffn-hidden-size": 256,
}

# What --preset chooses from; the first is the default.
ROUTING: dict[str, dict[str, Any]] = {
    "dynamic-moe": {"num-experts": 8, "moe-preset": "dynamic-moe"},
    # Slots to grow into, and windows as short as the training.
    "dynmoe": {
        "num-experts": 16,
        "moe-preset": "dynmoe",
        "moe-initial-experts": 4,
        "moe-record-from": 5,
        "moe-update-at": 15,
        "moe-update-period": 15,
        "moe-max-rows-per-token": 4,
    },
    "moe-plus-plus": {"num-experts": 8, "moe-preset": "moe-plus-plus", "moe-tau": 0.5},
}

TRAINING: dict[str, Any] = {
    # Small batches and a high rate: what lowers the loss fastest in the three minutes that there are.
    "micro-batch-size": 4,
    "global-batch-size": 8,
    "train-iters": ITERATIONS,
    "init-method-std": 0.05,
    "lr": 6e-3,
    "min-lr": 6e-4,
    "lr-decay-style": "cosine",
    "lr-warmup-iters": 30,
    "weight-decay": 0.1,
    "clip-grad": 1.0,
    "adam-beta2": 0.95,
    "seed": 1234,
    "log-interval": 10,
    "eval-interval": 100 * ITERATIONS,
    "eval-iters": 16,
    "save-interval": SAVED_AT,
    "ckpt-format": "torch_dist",
    "num-workers": 0,
}


class DemoError(UserError):
    """The demo cannot go on; the message is one sentence for the user."""


@dataclass(frozen=True)
class Machine:
    """Ranks to start and what they compute on."""

    ranks: int
    gpus: int
    cores: int


@dataclass(frozen=True)
class Step:
    """One command and what the user is told about it.

    Attributes:
        name: of the log, and by which ``--continue`` knows the step.
        metrics: of a step that trains, the file that shows how far it is; the iterations are its range.
        discards: what an earlier attempt may have left and would be taken up; removed before the command runs.
    """

    name: str
    says: str
    command: list[str]
    metrics: Path | None = None
    first_iteration: int = 0
    last_iteration: int = 0
    discards: tuple[Path, ...] = ()


def look_at_machine(ranks: int | None = None, preset: str = "dynamic-moe") -> Machine:
    """Two ranks without GPUs; with GPUs one for each, at most two. ``ranks`` overrides.

    Raises:
        DemoError: the experts or the GPUs cannot be divided among ``ranks``.
    """
    import torch

    from megatron_dynmoe.checks import check_division

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = ranks if ranks is not None else min(2, gpus or 2)
    experts = ROUTING[preset]["num-experts"]
    check_division(experts, chosen, "--ranks", DemoError)
    if gpus and chosen > gpus:
        raise DemoError(f"--ranks is {chosen}; accepted: at most {gpus}, the number of GPUs.")
    return Machine(ranks=chosen, gpus=gpus, cores=len(os.sched_getaffinity(0)))


def data_steps(folder: Path) -> list[Step]:
    """Text of this machine, a tokenizer trained on it, and the indexed token files."""
    corpus, tokenizer = folder / "corpus", folder / "tokenizer"
    collect = tool("collect_corpus", output=corpus, megabytes=CORPUS_MEGABYTES, overwrite=True)
    train = tool("train_tokenizer", corpus=corpus, output=tokenizer, vocab_size=VOCABULARY, overwrite=True)
    encode = tool(
        "preprocess_data", tokenizer_model=tokenizer.with_suffix(".model"), append_eod=True, workers=2, overwrite=True
    )
    for subset, split in product(SUBSETS, ("train", "heldout")):
        shards = corpus / subset / f"{split}-*"
        encode += flags({"input": shards, "output_prefix": token_prefix(folder, subset, split)})
    return [
        Step("corpus", "collect real text from this machine", collect),
        Step("tokenizer", "train a SentencePiece BPE tokenizer on it", train),
        Step("tokens", "tokenize it: two subsets, each for training and held out", encode),
    ]


def training_steps(folder: Path, machine: Machine, preset: str = "dynamic-moe") -> list[Step]:
    """The loss before training, and both halves of pretraining.

    Reads the token counts of the files that ``data_steps`` wrote.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={machine.ranks}"]
    command += ["-m", "megatron_dynmoe.programs.pretrain", *flags(MODEL | ROUTING[preset]), *flags(TRAINING)]
    command += ["--expert-model-parallel-size", str(machine.ranks)]
    command += ["--train-data-path", *blend(folder, "train"), "--valid-data-path", *blend(folder, "heldout")]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", shown(folder / "tokenizer.model")]
    command += ["--save", shown(folder / "checkpoint"), "--load", shown(folder / "checkpoint")]
    # Megatron would keep the datasets' sample indices in a folder named as the token files' prefix.
    command += ["--data-cache-path", shown(folder / "cache")]
    command += ["--tensorboard-dir", shown(folder / "tensorboard"), *(["--bf16"] if machine.gpus else [])]
    zero, half, rest = (metrics_file(folder, part) for part in range(3))
    ranks = f"on {machine.ranks} {'GPU' if machine.gpus else 'CPU'} rank(s)"
    checkpoint = folder / "checkpoint"

    def part(name: str, says: str, metrics: Path, extra: list[str], **rest: Any) -> Step:
        words = [*command, *extra, "--moe-metrics-file", shown(metrics)]
        return Step(name, says, words, metrics, **rest)

    return [
        part("untrained", f"held-out loss of the untrained model {ranks}", zero, ["--skip-train"]),
        part(
            "pretrain-1",
            f"pretrain the first half {ranks}, save",
            half,
            ["--exit-interval", str(SAVED_AT)],
            last_iteration=SAVED_AT,
            discards=(checkpoint,),
        ),
        part(
            "pretrain-2",
            f"resume from the checkpoint {ranks}",
            rest,
            [],
            first_iteration=SAVED_AT,
            last_iteration=ITERATIONS,
        ),
    ]


def model_steps(folder: Path) -> list[Step]:
    """Export to a Hugging Face folder, then load and speak."""
    model, tokenizer = folder / "model", folder / "tokenizer.model"
    export = tool(
        "export_hf", checkpoint=folder / "checkpoint", output=model, tokenizer_model=tokenizer, overwrite=True
    )
    return [
        Step("export", "export the checkpoint to Hugging Face format", export),
        Step(
            "generate",
            "load it with AutoModelForCausalLM and sample",
            [
                *tool("generate", model=model, max_new_tokens=48, temperature=0.8, seed=TRAINING["seed"]),
                *("--prompt", *PROMPTS),
            ],
        ),
    ]


def metrics_file(folder: Path, part: int) -> Path:
    """Where part 0 (untrained), 1 (first half) or 2 (second half) writes its metrics."""
    return folder / f"metrics-{part}.jsonl"


def token_prefix(folder: Path, subset: str, split: str) -> Path:
    """Where the token file of a subset lies, without its .bin or .idx."""
    return folder / "tokens" / f"{subset}_{split}"


def blend(folder: Path, split: str) -> list[str]:
    """Megatron's ``weight prefix weight prefix``: each subset weighs as many tokens as it has."""
    words = []
    for subset in SUBSETS:
        path = token_prefix(folder, subset, split)
        tokens = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))["tokens"]
        words += [str(tokens), shown(path)]
    return words


def tool(name: str, **options: Any) -> list[str]:
    """The command of a program of the package with ``options`` as flags."""
    return [sys.executable, "-m", f"megatron_dynmoe.programs.{name}", *flags(options)]


def flags(options: dict[str, Any]) -> list[str]:
    """``{"num_layers": 4, "swiglu": True}`` as ``--num-layers 4 --swiglu``."""
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(shown(value) if isinstance(value, Path) else str(value))
    return words


def shown(path: Path) -> str:
    """``path`` as seen from the current folder if it lies below it: shorter to read and to repeat."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
