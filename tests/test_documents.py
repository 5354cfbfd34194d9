"""Documents that people read: short lines and sentences, a README table at a glance, links that lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("*.md", "docs/*.md", "benchmarks/*.md", "examples/*/*.md", "tests/*/*.md")
DOCUMENTS = [path for place in PLACES for path in sorted(ROOT.glob(place))]
MOST_COLUMNS, MOST_WORDS = 100, 25
BULLET = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")


def prose(path: Path) -> list[str]:
    """Lines outside of code, tables and headings; those are left empty."""
    lines, code = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = line.lstrip().startswith("```")
        code ^= fence
        skipped = fence or code or re.match(r"^(#|\s*\||    |<|!\[)", line)
        lines.append("" if skipped else line)
    return lines


def sentences(lines: list[str]) -> list[str]:
    """Without code, links' targets and bullets."""
    text = "\n".join(f"\n{BULLET.sub('', line)}" if BULLET.match(line) else line for line in lines)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = re.sub(r"`[^`]*`", "CODE", " ".join(paragraph.split()))
        flat = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", flat)
        found += re.split(r"(?<=[.!?:;*])\s+", flat)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_sentences_are_short(path: Path) -> None:
    lines = prose(path)
    assert [line for line in lines if len(line) > MOST_COLUMNS and " " in line.strip()[4:]] == []
    for sentence in sentences(lines):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        names = sum(word.startswith("CODE") for word in words)
        assert len(words) <= MOST_WORDS or names > len(words) / 2, sentence  # a list of flags is no sentence


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_table_of_differences_is_read_at_a_glance() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## What it does that stock Megatron does not")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 6
    assert all(len(cell.split()) <= 12 for row in rows for cell in row.strip("|").split("|"))
