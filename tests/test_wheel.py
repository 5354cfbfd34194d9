"""The wheel as a newcomer has it: built, installed outside of any checkout, from text to generation by its commands.

The environment is a new one; what the package requires comes from this Python's by a ``.pth`` file. The checkout is
installed there as editable by a ``.pth`` of its own, and those of a folder that a ``.pth`` names are not read.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_dynmoe

ROOT = Path(__file__).resolve().parent.parent
SOURCES = "setup.py pyproject.toml README.md LICENSE CHANGELOG.md MANIFEST.in constraints.txt megatron_dynmoe examples"
PROMPT = "Pretrain"
MODEL = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-ffn-hidden-size 32 --moe-preset dynamic-moe"""
TRAINING = """--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --split 100,0,0 --eval-interval 100 --eval-iters 0
    --log-interval 1 --num-workers 0 --data-path text --data-cache-path cache --tokenizer-type SentencePieceTokenizer
    --tokenizer-model tokenizer.model --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
    --moe-metrics-file metrics.jsonl --save checkpoint --load checkpoint --save-interval 8
    --lr-decay-iters 100"""


@dataclass(frozen=True)
class Installed:
    """A fresh environment with the wheel, and a folder that is no checkout."""

    bin: Path
    folder: Path

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """One of the environment's programs, in the folder."""
        dropped = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"}
        left = {name: value for name, value in os.environ.items() if name not in dropped}
        ours = {"PATH": f"{self.bin}:{os.defpath}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ours |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf"), "PYTHONWARNINGS": "ignore"}
        if sys.dont_write_bytecode:  # many programs start here: each would compile megatron again, ten seconds
            ours["PYTHONPYCACHEPREFIX"] = str(self.folder / "bytecode")
        return subprocess.Popen(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=left | ours | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str) -> str:
        """What the program prints; it has to succeed."""
        return ended(self.start(*command))[0]


def ended(process: subprocess.Popen) -> tuple[str, str]:
    """Output and errors of a program that has to succeed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, f"{process.args}\n{out[-3000:]}\n{err[-3000:]}"
    return out, err


def build(kind: str, source: Path, target: Path) -> Path:
    """What ``pip wheel --no-build-isolation`` builds: with this Python's setuptools, nothing fetched."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=240)
    return max(target.iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the checkout's files, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES.split():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    sdist = build("sdist", source, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return sdist, build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder / "wheel")


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    place = folder / "environment"
    venv.create(place, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python")]
    quiet = ["-q", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *quiet, str(archives[1])], check=True, timeout=240)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (packages / "required.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (folder / "run").mkdir()
    return Installed(place / "bin", folder / "run")


def commands() -> list[str]:
    """The console commands, but for the import where the sources do not have it yet."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    names = re.findall(r'^ {4}"(\w+)": "([\w.]+)",$', setup, re.M)
    there = [name for name, module in names if (ROOT / f"megatron_dynmoe/{module.replace('.', '/')}.py").exists()]
    assert {name for name, _ in names} - set(there) <= {"import"} and len(there) >= 10
    return [f"dynmoe-{name}" for name in there]


def test_archives_hold_what_is_read_at_run_time(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        assert {"CHANGELOG.md", "constraints.txt"} <= {name.split("/")[-1] for name in sdist.getnames()}
    names = set(zipfile.ZipFile(archives[1]).namelist())
    package = [path for path in (ROOT / "megatron_dynmoe").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {str(path.relative_to(ROOT)) for path in package} <= names
    examples = [path for kind in ("*.sh", "*.py", "models/*") for path in (ROOT / "examples").glob(kind)]
    assert {f"megatron_dynmoe/{path.relative_to(ROOT)}" for path in examples} <= names
    assert not [name for name in names if not name.startswith("megatron_dynmoe")]


def test_the_package_is_the_wheels(installed: Installed) -> None:
    code = "import sys, megatron_dynmoe, torch; print(megatron_dynmoe.__file__, *sys.path, sep='\\n')"
    file, *path = installed.run("python", "-c", code).splitlines()
    assert Path(file).is_relative_to(installed.bin.parent)
    assert str(ROOT) not in path


def test_commands_say_at_once_what_they_do_and_their_version(installed: Installed) -> None:
    """At once: without what takes seconds to import."""
    heavy = re.compile(r"\| +(torch|megatron|transformers|matplotlib)$", re.M)
    for command in commands():
        asked = [installed.start(command, flag, PYTHONPROFILEIMPORTTIME="1") for flag in ("--help", "--version")]
        (shown, imports), (version, _) = map(ended, asked)
        assert version.strip() == f"megatron_dynmoe {megatron_dynmoe.__version__}", command
        assert shown.startswith("usage: ") and re.search(rf"\nexample\b.*\n  .*{command}\b", shown), command
        assert not heavy.search(imports), (command, heavy.findall(imports))


def records(folder: Path) -> Sequence[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "lm_loss" in row]


def test_from_text_to_generation(installed: Installed) -> None:
    run, folder = installed.run, installed.folder
    paragraphs = [part for part in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") if part.strip()]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs))
    assert "wrote tokenizer.model" in run(
        *"dynmoe-tokenizer --corpus text.jsonl --output tokenizer --vocab-size 400".split()
    )
    encode = "dynmoe-preprocess --input text.jsonl --output-prefix text --tokenizer-model tokenizer.model --workers 1"
    assert f"text: {len(paragraphs)} documents" in run(*encode.split(), "--append-eod")

    # two ranks by torchrun; then one by itself goes on from their checkpoint
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 2".split()
    train = [*MODEL.split(), *TRAINING.split()]
    pretrain = [str(installed.bin / "dynmoe-pretrain"), *train, "--train-iters"]
    run(*torchrun, *pretrain, "8", "--expert-model-parallel-size", "2")
    export = "dynmoe-export --checkpoint checkpoint --output model --tokenizer-model tokenizer.model"
    goes_on, exports = installed.start(*pretrain, "10"), installed.start(*export.split(), "--iteration", "8")
    assert "checkpoint/iter_0000008 -> " in ended(exports)[0]
    pages = [
        installed.start(*words.split())
        for words in (
            "dynmoe-report tokens --model model --text Dynamic --output tokens.html",
            "dynmoe-plan dynmoe_24l --gpus 8",
            "dynmoe-doctor",
        )
    ]
    said = run("dynmoe-generate", "--model", "model", "--prompt", PROMPT, "--max-new-tokens", "8")
    assert said.startswith(PROMPT) and len(said) > len(PROMPT) + 1
    _, plan, doctor = (ended(page)[0] for page in pages)
    assert "| dynmoe_24l | 8 |" in plan and "This machine can train." in doctor
    assert "</html>" in (folder / "tokens.html").read_text(encoding="utf-8")

    ended(goes_on)
    run(*"dynmoe-report experts metrics.jsonl --output experts.svg --table experts.md".split())
    assert (folder / "experts.svg").stat().st_size and (folder / "experts.md").stat().st_size
    rows = records(folder)
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    losses = [row["lm_loss"] for row in rows]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.5  # from ln 512; steps of 1e-2 learn fast
