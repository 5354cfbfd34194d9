"""Real text that is on any machine where this project is installed: what ``corpus.py`` collects.

Two subsets, told apart by what a file mostly is:

- ``code``: Python sources of the standard library first, then of the installed packages.
- ``docs``: the language reference (``pydoc_data.topics``), README and other documentation files, package descriptions,
  and one page for every source file of which at least ``DOCSTRING_SHARE`` are docstrings, like an API reference.

A file serves one subset only, so no docstring is in both. Files come in an order that depends on their path's hash
and not on the alphabet: a size limit then takes a sample of all packages instead of the first few, and the same
machine gives the same order.
"""

import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CODE, DOCS = "code", "docs"
DOCSTRING_SHARE = 0.3
MIN_CHARS, MAX_CHARS, MAX_LINE_CHARS = 200, 200_000, 1_000
MIN_LETTER_SHARE = 0.65

_SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "testing",
    "idle_test",
    "licenses",
    "megatron_dynmoe",
}
_SKIPPED_STEMS = re.compile(
    r"(?i)licen[cs]e|copying|notice|authors|entry_points|top_level|requirements|installed|vendor|sources\b"
)
_DOC_SUFFIXES = {".md", ".rst", ".txt"}
_GENERATED = re.compile(r"(?i)auto-?generated|@generated|generated (?:by|from|automatically)|do not (?:edit|modify)")
_NOT_LETTERS = bytes(range(33, 65)) + bytes(range(91, 97)) + bytes(range(123, 127))

# Python's grammar of strings and comments, enough to tell a docstring (a triple-quoted string that begins its line)
# from other text. ast would be exact, and takes ten times as long. The possessive `++` keep an unclosed quote from
# backtracking.
_TOKENS = re.compile(
    r"""(?smx)
      \#[^\n]*
    | ^[ \t]*(?:async[ ]def|def|class)[ ]+(?P<name>\w+)
    | (?P<line_start>^[ \t]*[rRuU]?)?
      (?: \"{3}(?P<double>(?:[^"\\]++|\\.|"(?!""))*+)\"{3} | '{3}(?P<single>(?:[^'\\]++|\\.|'(?!''))*+)'{3} )
    | "(?:[^"\\\n]++|\\.)*+"
    | '(?:[^'\\\n]++|\\.)*+'
    """
)


@dataclass(frozen=True)
class Document:
    """One text. subset: ``code`` or ``docs``. source: the package it is from. path: below that package's root."""

    subset: str
    text: str
    source: str
    path: str


def find_documents(*, wanted: set[str]) -> Iterator[Document]:
    """Every usable document of this machine, in a fixed order.

    wanted: the subsets still asked for; the caller removes one that is full, and files that could only serve it are
    then not read.
    """
    if DOCS in wanted:
        yield from _language_reference()
    yield from _tree(Path(sysconfig.get_path("stdlib")), wanted, source="python-stdlib")
    yield from _tree(Path(sysconfig.get_path("purelib")), wanted, source=None)


def is_usable(text: str) -> bool:
    """False for binary, minified and generated text, tables of numbers, stubs and giants."""
    if not MIN_CHARS <= len(text) <= MAX_CHARS or "\0" in text or _GENERATED.search(text, 0, 1_000):
        return False
    if max(map(len, text.split("\n"))) > MAX_LINE_CHARS:
        return False
    data = text.encode()
    return len(data.translate(None, _NOT_LETTERS)) >= MIN_LETTER_SHARE * len(data)


def docstring_page(source: str, title: str) -> str:
    """The docstrings of one Python source file as a page, each under the name it documents."""
    name, parts = title, []
    for token in _TOKENS.finditer(source):
        if token["name"]:
            name = token["name"]
        elif token["line_start"] is not None:
            text = inspect.cleandoc(token["double"] or token["single"] or "")
            if text:
                parts.append(f"{name}\n{'-' * len(name)}\n{text}\n")
    return "\n".join(parts)


def _language_reference() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some Linux distributions ship pydoc apart
        return
    for name, text in sorted(topics.items()):
        if is_usable(text):
            yield Document(DOCS, text, "python-reference", f"pydoc_data/topics/{name}")


def _tree(root: Path, wanted: set[str], *, source: str | None) -> Iterator[Document]:
    for path in _shuffled_files(root):
        if not wanted:
            return
        relative = path.relative_to(root)
        if path.suffix != ".py" and DOCS not in wanted:
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except (UnicodeDecodeError, OSError):
            continue
        document = _document(text, relative, source or relative.parts[0].partition(".dist-info")[0])
        if document and document.subset in wanted and is_usable(document.text):
            yield document


def _document(text: str, relative: Path, source: str) -> Document | None:
    path = relative.as_posix()
    if relative.name == "METADATA":
        text = text.partition("\n\n")[2]  # the description follows the header fields
        return Document(DOCS, text, source, path)
    if relative.suffix in _DOC_SUFFIXES:
        return Document(DOCS, text, source, path)
    if len(text) > MAX_CHARS or relative.parts[0] == "pydoc_data":
        return None
    # what stands between triple quotes bounds the docstrings from above, and is cheaper to count than to parse
    if sum(map(len, text.split('"""')[1::2])) >= DOCSTRING_SHARE * len(text):
        page = docstring_page(text, ".".join(relative.with_suffix("").parts))
        if len(page) >= DOCSTRING_SHARE * len(text):
            return Document(DOCS, page, source, path)
    return Document(CODE, text, source, path)


def _shuffled_files(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in root.walk():
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith((".", "_vendor"))]
        found += [folder / f for f in files if _is_candidate(f)]
    return sorted(found, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def _is_candidate(name: str) -> bool:
    path = Path(name)
    if path.suffix == ".py" or name == "METADATA":
        return True
    return path.suffix in _DOC_SUFFIXES and not _SKIPPED_STEMS.search(path.stem)
