"""The Python files beside exported weights: the model's, and those of the routing code that it needs.

They are the library's own files, flattened into one folder. Only import lines differ: `from megatron_dynmoe.a.b import
x` is `from .b import x` there, which transformers follows when it loads or saves a model. What comes along is what the
model's files import, and in turn what that imports, with the files of the chosen gate and rule alone.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dynmoe.routers.registry import GATES, RULES

from .errors import ExportError

PACKAGE = __name__.partition(".")[0]
ROOTS = tuple(f"{__package__}.{name}_dynmoe" for name in ("configuration", "router", "free_experts", "modeling"))
# Rooms of the library that need torch alone.
SHARED = tuple(f"{PACKAGE}.{room}" for room in ("routers", "losses", "ranges", "errors"))


@dataclass(frozen=True)
class _Import:
    """`from module import names`, with the lines of the source that it takes."""

    module: str
    names: tuple[ast.alias, ...]
    first: int
    last: int
    indent: int


def write_code(gate: str, rule: str, folder: str | Path) -> None:
    """Write the files of a model with this gate and rule.

    Raises:
        ExportError: a file imports what cannot come along, naming both.
    """
    for name, source in sources(gate, rule).items():
        (Path(folder) / name).write_text(source, encoding="utf-8")


def sources(gate: str, rule: str) -> dict[str, str]:
    """The files by name; see :func:`write_code`."""
    methods = _homes(gate, rule)
    own = {module.partition(".")[0] for module in methods} | {PACKAGE}
    found: dict[str, str] = {}
    todo = [*ROOTS, *methods]
    modules: list[str] = []
    while todo:
        module = todo.pop(0)
        if module not in modules:
            modules.append(module)
            todo += [
                target for entry in _imports(module, own, methods) for target, _ in _targets(module, entry, methods)
            ]
    names = _names(modules)
    for module in modules:
        found[f"{names[module]}.py"] = _rewritten(module, own, methods, names)
    return found


def _homes(gate: str, rule: str) -> tuple[str, ...]:
    """The modules in which the chosen methods stand."""
    return tuple(dict.fromkeys(method.function.__module__ for method in (GATES[gate], RULES[rule])))


def _names(modules: list[str]) -> dict[str, str]:
    """A file's name for each module: the last part of its own, or all of it where another has that."""
    names: dict[str, str] = {}
    for module in modules:
        short = module.rpartition(".")[2]
        names[module] = module.replace(".", "_") if short in names.values() else short
    return names


def _path(module: str) -> Path:
    """The source file of a module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ExportError(f"the module {module} has no source file, so it cannot be copied beside the weights.")
    return Path(spec.origin)


def _imports(module: str, own: set[str], methods: tuple[str, ...]) -> Iterator[_Import]:
    """The imports of a module that come along.

    Raises:
        ExportError: one that can neither come along nor be had where the export is loaded.
    """
    path = _path(module)
    is_root = module in ROOTS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check(path, alias.name, own, f"import {alias.name}", is_root, whole=True)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            relative = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(relative, package) if node.level else node.module or ""
            said = f"from {relative} import {', '.join(alias.name for alias in node.names)}"
            methods_of_root = is_root and (origin, node.names[0].name) == (PACKAGE, "routers")
            if methods_of_root or _check(path, origin, own, said, is_root, whole=node.module is None):
                yield _Import(origin, tuple(node.names), node.lineno, node.end_lineno or 0, node.col_offset)


def _check(path: Path, module: str, own: set[str], said: str, is_root: bool, *, whole: bool) -> bool:
    """Whether a module comes along; torch, the standard library and, for the model's files, transformers do not."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "torch" or (is_root and top == "transformers"):
        return False
    shared = any(module == room or module.startswith(f"{room}.") for room in SHARED)
    if top in own and not whole and (top != PACKAGE or shared or (is_root and module in ROOTS)):
        return True
    wanted = "torch, the standard library, and 'from ... import' of megatron_dynmoe.routers, losses, ranges and errors"
    raise ExportError(f"{path} says '{said}', which cannot be copied beside the weights; accepted: {wanted}.")


def _targets(module: str, entry: _Import, methods: tuple[str, ...]) -> list[tuple[str, list[ast.alias]]]:
    """The modules that an import's names come from: of a package, those that it has them from.

    Raises:
        ExportError: a package has a name from nowhere.
    """
    if (entry.module, entry.names[0].name) == (PACKAGE, "routers"):
        return [(method, [ast.alias("__name__", f"_method{n}")]) for n, method in enumerate(methods)]
    path = _path(entry.module)
    if path.name != "__init__.py":
        return [(entry.module, list(entry.names))]
    found: dict[str, list[ast.alias]] = {}
    for alias in entry.names:
        home = _home(entry.module, path, alias.name)
        if home is None:
            raise ExportError(
                f"{_path(module)} says 'from {entry.module} import {alias.name}', which is a module or stands in the "
                "package itself; accepted: 'from ... import' of what stands in a module."
            )
        found.setdefault(home, []).append(alias)
    return list(found.items())


def _home(package: str, path: Path, name: str) -> str | None:
    """The module that a package, of which `path` is the file, has a name from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, package) if node.level else node.module or ""
            return module if module != package else None
    return None


def _rewritten(module: str, own: set[str], methods: tuple[str, ...], names: dict[str, str]) -> str:
    """The source with import lines that point to files beside it."""
    lines = _path(module).read_text(encoding="utf-8").splitlines(keepends=True)
    for entry in sorted(_imports(module, own, methods), key=lambda entry: -entry.first):
        new = [
            f"{' ' * entry.indent}from .{names[target]} import {', '.join(_said(alias) for alias in aliases)}\n"
            for target, aliases in _targets(module, entry, methods)
        ]
        lines[entry.first - 1 : entry.last] = new
    return "".join(lines)


def _said(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name
