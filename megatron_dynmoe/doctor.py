"""What is installed on this machine, what it is used for, and what stands in where it is missing.

    python -m megatron_dynmoe.doctor             # a table; exit code 0 if this machine can train, else 1 and the reason
    python -m megatron_dynmoe.doctor --json      # the same for programs
    python -m megatron_dynmoe.doctor --missing   # required packages that are not installed, one requirement a line
    python -m megatron_dynmoe.doctor --examples  # the folder of the example scripts

Versions come from package metadata and modules are looked up without being imported, torch excepted: importing megatron
or Transformer Engine takes seconds and can fail, and a diagnosis must do neither. What is asked of torch is its own
account of its devices and collectives.
"""

import importlib
import importlib.machinery
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_dynmoe.programs.command import command_parser, examples

PYTHON = (3, 12)
MEGATRON_CORE = "0.19.2"
# Their dependencies are the business of whoever built them: a container's torch brings CUDA without its packages.
SEALED = {"torch", "transformer-engine"}
# But what Transformer Engine 2.20's Python imports at its start has to be there: without it Megatron trains as if there
# were no Transformer Engine. (packaging, einops and psutil, which it or the checkpoint writer imports, are required of
# every machine.)
IMPORTED_BY_TE = ("onnxscript", "onnx", "onnx_ir", "ml_dtypes", "pydantic")


@dataclass(frozen=True)
class Row:
    """One line of the table. ``version`` is None where the thing is missing, and then ``otherwise`` is what happens."""

    what: str
    version: str | None
    used_for: str
    otherwise: str


@dataclass(frozen=True)
class Diagnosis:
    """All rows, the requirements that are missing, and in one sentence why training cannot start (None: it can)."""

    rows: list[Row]
    missing: list[str] = field(default_factory=list)
    reason: str | None = None


def diagnose() -> Diagnosis:
    """Look at this machine. Imports torch and nothing else that is heavy; changes nothing."""
    torch = _import_torch()
    missing = missing_requirements()
    rows = [
        Row("Python", platform.python_version(), "everything", "nothing runs"),
        *_torch_rows(torch),
        *_megatron_rows(),
    ]
    rows += [*_accelerator_rows(), *_text_rows(), *_logging_rows()]
    return Diagnosis(rows=rows, missing=missing, reason=_why_not(torch, missing))


def missing_requirements(root: str = "megatron_dynmoe") -> list[str]:
    """Requirements of ``root``, direct and indirect, whose package is absent; extras are left out.

    A package that is there in another version than asked for is not missing: on a cluster's container it must stay.
    What an absent package requires is unknown until it is installed, so ask again after installing what this returns.
    """
    missing: dict[str, str] = {}
    seen: set[str] = set()
    queue = [root]
    while queue:
        for requirement in _requirements(queue.pop()):
            name = canonicalize_name(requirement.name)
            if name in seen:
                continue
            seen.add(name)
            if _version(requirement.name) is None:
                missing[name] = f"{requirement.name}{requirement.specifier}"
            elif name not in SEALED:
                queue.append(requirement.name)
    return sorted([*missing.values(), *(name for name in _te_lacks() if canonicalize_name(name) not in missing)])


def _te_version() -> str | None:
    return _version("transformer-engine") or _version("transformer-engine-torch")


def _te_lacks() -> list[str]:
    """What an installed Transformer Engine cannot be imported without, as far as it is missing."""
    return [name for name in IMPORTED_BY_TE if _te_version() is not None and _version(name) is None]


def _requirements(distribution: str) -> Iterator[Requirement]:
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:  # running from a checkout that was never installed
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    return find_spec(module)


def _import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError):  # OSError: a shared library of torch is missing or damaged
        return None


def _torch_rows(torch: Any) -> Iterator[Row]:
    yield Row("torch", torch and torch.__version__, "tensors, autograd, grouped GEMM", "nothing runs")
    yield Row("CUDA", _cuda(torch), "training on GPUs, bfloat16", "the CPU, gloo, float32 (host)")
    nccl = torch is not None and torch.cuda.is_available() and torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else None
    yield Row("NCCL", version, "collectives between GPUs", "gloo")
    gloo = torch is not None and torch.distributed.is_available() and torch.distributed.is_gloo_available()
    yield Row("gloo", "in torch" if gloo else None, "collectives between CPU ranks", "one needs NCCL and GPUs")


def _cuda(torch: Any) -> str | None:
    """CUDA's version, the driver's and the devices; None where torch sees no device."""
    if torch is None or not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    return f"{torch.version.cuda}, driver {_driver() or 'unknown'}, {count} x {torch.cuda.get_device_name(0)}"


def _driver() -> str | None:
    """Version of the NVIDIA driver as nvidia-smi tells it; None without driver or tool."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split("\n")[0].strip() or None


def _megatron_rows() -> Iterator[Row]:
    yield Row("megatron-core", _version("megatron-core"), "model, parallelism, training loop", "nothing trains")
    spec = _spec("megatron")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    helper = [path for place in places for path in place.glob("core/datasets/helpers_cpp*.so")]
    built = "compiled" if helper else None
    yield Row("megatron's dataset helper", built, "sample index of the datasets", "compiled at start (needs make, g++)")


def _accelerator_rows() -> Iterator[Row]:
    yield Row(
        "Transformer Engine",
        _te_version(),
        "FP8 experts, fused permute, attention",
        "torch grouped GEMM, torch kernels",
    )
    if lacks := _te_lacks():
        yield Row("what it imports", None, "importing Transformer Engine", f"it does not; missing: {', '.join(lacks)}")
    yield Row("apex", *_apex(), "fused Adam and norms of Transformer Engine or torch")
    fused = (
        "apex" if _spec("fused_weight_gradient_mlp_cuda") else "Transformer Engine's GEMM" if _te_version() else None
    )
    use = "weight gradients added up by the product that makes them"
    yield Row("fused accumulation", fused, use, "an addition of its own")
    deep_ep = _spec("deep_ep")
    version = (_version("deep-ep") or "installed") if deep_ep else None
    use = "flex dispatcher, at most 32 experts a token"
    if deep_ep is not None and _mentions(deep_ep, "ElasticBuffer"):
        use = "nothing: megatron-core 0.19 takes DeepEP 1.2.1 or the branch hybrid-ep, not 2.0"
    yield Row("DeepEP", version, use, "all-to-all dispatcher")
    hybrid = version if deep_ep is not None and _mentions(deep_ep, "HybridEPBuffer") else None
    yield Row("HybridEP", hybrid, "flex dispatcher, any number of experts a token", "all-to-all dispatcher")


def _apex() -> tuple[str | None, str]:
    """Version and use of apex: NVIDIA's builds the extension amp_C, the index's package of that name does not."""
    if _spec("apex") is None:
        return None, "fused Adam and norms"
    version = _version("apex") or "installed"
    if _spec("amp_C") is None:
        return f"{version} (unrelated)", "nothing: not NVIDIA's, another package of that name"
    return version, "fused Adam and norms"


def _mentions(spec: importlib.machinery.ModuleSpec, name: str) -> bool:
    return spec.origin is not None and name in Path(spec.origin).read_text(encoding="utf-8", errors="replace")


def _text_rows() -> Iterator[Row]:
    yield Row("sentencepiece", _version("sentencepiece"), "training and reading tokenizers", "tokenizer.json only")
    yield Row("tokenizers", _version("tokenizers"), "reading tokenizer.json", "SentencePiece models only")
    yield Row("transformers", _version("transformers"), "exported models", "training only")
    yield Row("zstandard", _version("zstandard"), "reading .jsonl.zst", ".jsonl and .jsonl.gz only")


def _logging_rows() -> Iterator[Row]:
    yield Row("TensorBoard", _version("tensorboard"), "curves (--tensorboard-dir)", "console and jsonl")
    yield Row("W&B", _version("wandb"), "curves (--wandb-project)", "TensorBoard, console and jsonl")


def _why_not(torch: Any, missing: list[str]) -> str | None:
    """The first reason in one sentence why training cannot start here; None if it can."""
    if sys.version_info[:2] != PYTHON:
        return f"Python is {platform.python_version()}; this version of megatron_dynmoe needs {PYTHON[0]}.{PYTHON[1]}."
    if torch is None:
        return "torch is missing or does not import; install one of 2.11 to 2.13."
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm; install one of 2.11 to 2.13."
    core = _version("megatron-core")
    if core is not None and core != MEGATRON_CORE:
        return f"megatron-core is {core}; this version of megatron_dynmoe needs {MEGATRON_CORE} exactly."
    if core is None and not missing:
        return f"megatron-core is missing; install {MEGATRON_CORE}."
    if missing:
        return f"required packages are missing: {', '.join(missing)}."
    if not torch.distributed.is_available():
        return f"torch {torch.__version__} was built without torch.distributed; install a build that has it."
    backend, there = _backend(torch)
    return None if there else f"torch {torch.__version__} was built without {backend}; install a build that has it."


def _backend(torch: Any) -> tuple[str, bool]:
    """The collectives that a run on this machine needs, and whether torch has them."""
    if torch.cuda.is_available():
        return "NCCL", torch.distributed.is_nccl_available()
    return "gloo", torch.distributed.is_gloo_available()


def table(diagnosis: Diagnosis) -> str:
    """The rows in columns; an arrow marks the stand-in that is in force."""
    cells = [("what", "version", "used for", "otherwise")]
    for row in diagnosis.rows:
        arrow = "" if row.version else "-> "
        cells.append((row.what, row.version or "none", row.used_for, arrow + row.otherwise))
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]) for line in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the diagnosis; returns 0 when this machine can train, else 1. With --missing the list is the answer: 0."""
    parser = command_parser(
        "What is installed here and what it serves; exit code 0 if this machine can train.",
        example="dynmoe-doctor\nbash $(dynmoe-doctor --examples)/laptop.sh",
        prog="megatron_dynmoe.doctor",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--missing", action="store_true", help="print the required packages that are missing, for pip")
    form.add_argument("--examples", action="store_true", help="print the folder of the example scripts and models")
    options = parser.parse_args(argv)
    if options.examples:
        print(examples())
        return 0
    if options.missing:
        if _version("megatron_dynmoe") is None:
            print(
                "doctor: megatron_dynmoe is not installed here; `pip install --no-deps . packaging` comes first.",
                file=sys.stderr,
            )
            return 1
        print("".join(f"{line}\n" for line in missing_requirements()), end="")
        return 0
    diagnosis = diagnose()
    if options.json:
        print(json.dumps(asdict(diagnosis) | {"can_train": diagnosis.reason is None}, indent=2))
    else:
        print(table(diagnosis))
        print(f"\nThis machine cannot train: {diagnosis.reason}" if diagnosis.reason else "\nThis machine can train.")
    return 1 if diagnosis.reason else 0


if __name__ == "__main__":
    sys.exit(main())
