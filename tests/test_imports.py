"""The direction of imports, read from the sources: ``LEVELS`` is the order, lowest first.

A room may import rooms of lower levels; rooms of one level do not import each other.  ``examples``, ``tools`` and
``benchmarks`` import the library, and it imports none of them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_dynmoe"

LEVELS = [
    {"ranges", "errors", "units", "losses", "model_shape"},
    {"routers", "records"},
    {"config"},
    {"checks"},
    {"routing", "plugins"},
    {"dispatch", "experts", "metrics", "planning", "checkpoint"},
    {"mcore"},
    {"training", "hf", "data", "report"},
    {"programs"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
# Outside the order: the redirection for machines without CUDA, the diagnosis, the driver of the demo, the nodes'
# supervisors, the test oracle.
ASIDE = {"host", "doctor", "demo", "launch", "reference", "__init__"}
# Who may import ASIDE rooms, and whom those may import.
ASIDE_IMPORTED_BY = {"host": {"training", "mcore", "hf", "data", "programs"}, "launch": {"training", "programs"}}
# doctor and demo are commands too, and take what commands share.
ASIDE_IMPORTS = {
    "reference": {"config", "routing"},
    "doctor": {"programs"},
    "demo": {"programs", "checks", "errors"},
    "launch": {"errors"},
}

MEGATRON_ROOMS = {"mcore": ("megatron.core",), "training": ("megatron",), "host": ("megatron",)}
MEGATRON_ROOMS["data"] = ("megatron.core.datasets", "megatron.core.tokenizers")


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Dotted names that ``source``, the text of ``module``, imports; a package is named ``package.__init__``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            # `from package import name`: name may be a module, and is the more precise answer
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def under(name: str, prefix: str) -> bool:
    """Whether the dotted ``name`` is ``prefix`` or lies in it."""
    return name == prefix or name.startswith(prefix + ".")


def room_of(name: str) -> str | None:
    """The room of a dotted name of the package, None for everything else and for the package's own attributes."""
    parts = name.split(".")
    if parts[0] != PACKAGE or len(parts) < 2:
        return None
    return parts[1] if parts[1] in LEVEL or parts[1] in ASIDE else None


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module of the library, one sentence each."""
    room = module.split(".")[1]
    found = []
    for name in imported_modules(source, module):
        if under(name, "megatron") and not any(under(name, allowed) for allowed in MEGATRON_ROOMS.get(room, ())):
            found.append(f"{module} imports {name}, which room {room} may not")
        if name.split(".")[0] in {"tools", "examples", "tests", "benchmarks"}:
            found.append(f"{module} imports {name}: the library imports no program")
        other = room_of(name)
        if other is not None and other != room and not may_import(room, other):
            found.append(f"{module} imports room {other}, which does not lie below {room}")
    return found


def may_import(room: str, other: str) -> bool:
    """Whether a module of ``room`` may import one of another room ``other``."""
    if room == "__init__":
        return True  # it re-exports; that it does so lazily is tested in test_packaging.py
    if other in ASIDE:
        return room in ASIDE_IMPORTED_BY.get(other, set())
    if room in ASIDE:
        return other in ASIDE_IMPORTS.get(room, set())
    return LEVEL[other] < LEVEL[room]


def library_modules() -> list[tuple[str, Path]]:
    """Dotted name and path of every module of the library."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in paths]


@pytest.mark.parametrize(
    ("module", "path"), library_modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_point_down(module: str, path: Path) -> None:
    assert complaints(module, path.read_text(encoding="utf-8")) == []


def test_every_room_has_a_level() -> None:
    rooms = {module.split(".")[1] for module, _ in library_modules()}
    assert rooms <= set(LEVEL) | ASIDE, "a new room needs its place in LEVELS"


@pytest.mark.parametrize("folder", ["tools", "examples", "benchmarks"])
def test_programs_do_not_import_the_oracle(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = list(imported_modules(path.read_text(encoding="utf-8"), path.stem))
        assert not [name for name in names if under(name, f"{PACKAGE}.reference")], f"{path} imports reference.py"


@pytest.mark.parametrize(
    ("module", "source", "part"),
    [
        ("losses", "import megatron.core", "may not"),
        ("data.preprocess", "from megatron.core import parallel_state", "may not"),
        ("mcore.layer", "def f():\n    from megatron.training import get_args", "may not"),
        ("hf.export", "import megatron.core.dist_checkpointing", "may not"),
        ("routers.top_p", "from megatron_dynmoe.config import DynMoEConfig", "does not lie below"),
        ("routers.top_p", "from ..dispatch import combine", "does not lie below"),
        ("routers.__init__", "from .. import config", "does not lie below"),
        ("config", "from megatron_dynmoe import routing", "does not lie below"),
        ("dispatch", "from megatron_dynmoe.mcore.layer import DynMoELayer", "does not lie below"),
        ("hf.export", "from megatron_dynmoe.data.tokenizers import to_hf_tokenizer", "does not lie below"),
        ("mcore.router", "from megatron_dynmoe import reference", "does not lie below"),
        ("doctor", "from megatron_dynmoe.mcore import layer", "does not lie below"),
        ("training.pretrain", "from megatron_dynmoe.programs import export_hf", "does not lie below"),
        ("programs.pretrain", "from megatron.core import parallel_state", "may not"),
        ("training.pretrain", "from tools import preprocess_data", "no program"),
    ],
)
def test_the_check_sees_a_wrong_import(module: str, source: str, part: str) -> None:
    found = complaints(f"{PACKAGE}.{module}", source)
    assert len(found) == 1
    assert part in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.preprocess", "from megatron.core.datasets import indexed_dataset"),
        ("data.preprocess", "from megatron.core.datasets.indexed_dataset import DType"),
        (
            "mcore.layer",
            "from megatron.core.transformer.moe.moe_layer import MoELayer\nfrom megatron_dynmoe import dispatch",
        ),
        ("training.pretrain", "from megatron.training import pretrain\nfrom ..mcore import specs\nfrom .. import host"),
        ("routers.top_p", "from megatron_dynmoe.routers.registry import register_rule\nfrom . import registry"),
        ("metrics", "from megatron_dynmoe.routing import RoutePlan\nimport megatronesque"),
    ],
)
def test_the_check_lets_a_right_import_pass(module: str, source: str) -> None:
    assert complaints(f"{PACKAGE}.{module}", source) == []
