"""Which part of a text each token is, and marks for the characters that leave none of their own."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MARKS = {"\n": "⏎", "\t": "⇥", "\x7f": "␡"}
_CONTROL_PICTURES = 0x2400  # the symbols of the control characters 0 to 31, in their order


@dataclass(frozen=True)
class Token:
    """One token of a text.

    Attributes:
        id: in the vocabulary. piece: its name there, such as ``▁the`` or ``<0x0A>``.
        text: the part of the text that it stands for; empty for a special token.
        shared: it stands for a part of ``text`` only, such as one byte of a character.
        gap: what the tokenizer dropped between the token before it and it.
    """

    id: int
    piece: str
    text: str
    shared: bool = False
    gap: str = ""


def tokens_of_text(
    text: str, *, ids: Sequence[int], pieces: Sequence[str], spans: Sequence[tuple[int, int]]
) -> tuple[Token, ...]:
    """The tokens of ``text``, from what a tokenizer says of it.

    Args:
        ids, pieces: of the tokens, in the order of the text.
        spans: for each the half-open range of characters that it came from; those of special tokens are empty.
    """
    places = [place for place, (start, end) in enumerate(spans) if end > start]
    shared: set[int] = set()
    for before, after in itertools.pairwise(places):
        if spans[after][0] < spans[before][1]:
            shared |= {before, after}
    tokens, reached = [], 0
    for place, (token_id, piece, (start, end)) in enumerate(zip(ids, pieces, spans, strict=True)):
        gap = text[reached:start] if end > start else ""
        tokens.append(Token(id=token_id, piece=piece, text=text[start:end], shared=place in shared, gap=gap))
        reached = max(reached, end)
    return tuple(tokens)


def visible(text: str, *, in_line: bool = False) -> Iterator[tuple[str, bool]]:
    """``text`` in parts (characters, whether they are a mark), in which every character leaves something to see.

    A line break or tab follows its mark, unless all has to stay ``in_line``; then spaces are marked too. A control or
    format character is replaced by its mark: it could vanish, or turn the direction of what follows.
    """
    plain = ""
    for character in text:
        mark = _mark(character, in_line=in_line)
        if mark is None:
            plain += character
            continue
        if plain:
            yield plain, False
        yield mark, True
        plain = character if character in "\n\t" and not in_line else ""
    if plain:
        yield plain, False


def _mark(character: str, *, in_line: bool) -> str | None:
    if character == " ":
        return "␣" if in_line else None
    if character in _MARKS:
        return _MARKS[character]
    category = unicodedata.category(character)
    if category in ("Cc", "Cf", "Zl", "Zp") or (in_line and category == "Zs"):
        code = ord(character)
        return chr(_CONTROL_PICTURES + code) if code < 32 else f"U+{code:04X}"
    return None
