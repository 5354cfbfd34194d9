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
from concurrent.futures import ThreadPoolExecutor
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
    --train-iters 10"""


@dataclass(frozen=True)
class Installed:
    """A fresh environment with the wheel, and a folder that is no checkout."""

    bin: Path
    folder: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """One of the environment's programs, in the folder; it has to succeed."""
        dropped = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"}
        left = {name: value for name, value in os.environ.items() if name not in dropped}
        ours = {"PATH": f"{self.bin}:{os.defpath}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ours |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf"), "PYTHONWARNINGS": "ignore"}
        if sys.dont_write_bytecode:  # many programs start here: each would compile megatron again, ten seconds
            ours["PYTHONPYCACHEPREFIX"] = str(self.folder / "bytecode")
        words, given = [str(self.bin / command[0]), *command[1:]], left | ours | environment
        done = subprocess.run(words, cwd=self.folder, env=given, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def says(self, *command: str) -> str:
        """What the program prints."""
        return self.run(*command).stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """What ``pip wheel --no-build-isolation`` builds: with this Python's setuptools, nothing fetched."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300)
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
    subprocess.run([*pip, "install", *quiet, str(archives[1])], check=True, timeout=300)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (packages / "required.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (folder / "run").mkdir()
    return Installed(place / "bin", folder / "run")


def commands() -> list[str]:
    """The console commands."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    names = re.findall(r'^ {4}"(\w+)": "([\w.]+)",$', setup, re.M)
    assert len(names) >= 10
    return [f"dynmoe-{name}" for name, _ in names]


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
    file, *path = installed.says("python", "-c", code).splitlines()
    assert Path(file).is_relative_to(installed.bin.parent)
    assert str(ROOT) not in path


def test_commands_say_at_once_what_they_do_and_their_version(installed: Installed) -> None:
    """At once: without what takes seconds to import; the plan's flags are those of the methods, which import torch."""
    heavy = re.compile(r"\| +(torch|megatron|transformers|matplotlib)$", re.M)
    for command in commands():
        assert installed.says(command, "--version").strip() == f"megatron_dynmoe {megatron_dynmoe.__version__}", command
        shown = installed.run(command, "--help", PYTHONPROFILEIMPORTTIME="1")
        assert re.match(r"usage: .*?\nexample\b.*?\n  .*?%s\b" % command, shown.stdout, re.S), command  # noqa: UP031
        found = set(heavy.findall(shown.stderr))
        assert found <= ({"torch"} if command == "dynmoe-plan" else set()), command


def records(folder: Path) -> Sequence[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "lm_loss" in row]


def test_from_text_to_generation(installed: Installed) -> None:
    says, folder = installed.says, installed.folder
    paragraphs = [part for part in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") if part.strip()]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs))
    train = "dynmoe-tokenizer --corpus text.jsonl --output tokenizer --vocab-size 400"
    assert "wrote tokenizer.model" in says(*train.split())
    encode = "dynmoe-preprocess --input text.jsonl --output-prefix text --tokenizer-model tokenizer.model --workers 1"
    assert f"text: {len(paragraphs)} documents" in says(*encode.split(), "--append-eod")

    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 2".split()
    pretrain = [str(installed.bin / "dynmoe-pretrain"), *MODEL.split(), *TRAINING.split()]
    says(*torchrun, *pretrain, "--exit-interval", "8", "--expert-model-parallel-size", "2")
    with ThreadPoolExecutor() as pool:  # one rank without torchrun goes on, while others read what there is
        goes_on = pool.submit(says, *pretrain)
        look_around = [
            pool.submit(says, *"dynmoe-plan dynmoe_24l --gpus 8".split()),
            pool.submit(says, "dynmoe-doctor"),
        ]
        export = "dynmoe-export --checkpoint checkpoint --output model --tokenizer-model tokenizer.model --iteration 8"
        assert "checkpoint/iter_0000008 -> " in says(*export.split())
        shade = "dynmoe-report tokens --model model --text Dynamic --output tokens.html"
        look_around.append(pool.submit(says, *shade.split()))
        said = says("dynmoe-generate", "--model", "model", "--prompt", PROMPT, "--max-new-tokens", "8")
    plan, doctor, _ = (future.result() for future in look_around)
    goes_on.result()
    draw = "dynmoe-report experts metrics.jsonl --output experts.svg"
    says(*draw.split())

    assert said.startswith(PROMPT) and len(said) > len(PROMPT) + 1
    assert "| dynmoe_24l | 8 |" in plan and "This machine can train." in doctor
    assert "</html>" in (folder / "tokens.html").read_text(encoding="utf-8")
    assert "<svg" in (folder / "experts.svg").read_text(encoding="utf-8")
    rows = records(folder)
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    losses = [row["lm_loss"] for row in rows]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.5  # from ln 512; steps of 1e-2 learn fast
