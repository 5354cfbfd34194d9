"""One HTML page of a text whose tokens are shaded by what they cost; it holds all it needs and runs no script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from megatron_dynmoe.report.token_costs import EntryCost, LayerCosts, TokenCosts
from megatron_dynmoe.report.token_style import SHADES, STYLE
from megatron_dynmoe.report.token_text import Token, visible

TABLE_ROWS = 20


@dataclass(frozen=True)
class PageHead:
    """What the page says of the model and of how it read the text.

    Attributes:
        model: its name. rule: how it chooses experts, in words.
        parameters, expert_parameters: of the whole model, and of one FFN expert.
        window: tokens that the model read at a time.
    """

    model: str
    rule: str
    parameters: int
    expert_parameters: int
    window: int


def token_page(costs: TokenCosts, head: PageHead) -> str:
    """The page as HTML; nothing of the text or the names is markup in it."""
    return "".join(
        [
            "<!DOCTYPE html>\n",
            '<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>Experts per token: {_in_line(head.model)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n",
            *_heading(costs, head),
            *_shaded_text(costs),
            *_tables(costs),
            *_layer_bars(costs),
            *_free_bars(costs),
            "</body>\n</html>\n",
        ]
    )


def _heading(costs: TokenCosts, head: PageHead) -> Iterable[str]:
    sizes = sorted({layer.experts for layer in costs.layers})
    of = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    activated = head.parameters - head.expert_parameters * costs.idle_experts
    figures = {
        "tokens": f"{len(costs.tokens):,}",
        "FFN experts per token and layer": f"{costs.mean:.2f} of {of}",
        "share of the FFN experts": f"{costs.share:.1%}",
        "activated parameters": (
            f"{_millions(activated)} of {_millions(head.parameters)} ({activated / head.parameters:.1%})"
        ),
    }
    yield f"<h1>{_in_line(head.model)}</h1>\n<p>{_in_line(head.rule)}</p>\n<dl>\n"
    for name, value in figures.items():
        yield f"<div><dt>{name}</dt><dd>{value}</dd></div>\n"
    yield "</dl>\n"
    windows = -(-len(costs.tokens) // head.window)
    if windows > 1:
        yield (
            f'<p class="note">The text was read in {windows} windows of up to {head.window:,} tokens; '
            "the first tokens of each knew nothing of the text before it.</p>\n"
        )


def _shaded_text(costs: TokenCosts) -> Iterable[str]:
    least, most = min(costs.means), max(costs.means)
    yield '<h2>The text</h2>\n<div class="legend">FFN experts, mean over layers\n'
    if most > least:
        cells = "".join(f'<span class="h{step}"></span>' for step in range(SHADES))
        ends = "".join(f"<span>{value:.2f}</span>" for value in (least, (least + most) / 2, most))
        yield f'<div class="scale">{cells}</div>\n<div class="ends">{ends}</div>\n'
    else:
        yield f"<p>Every token uses {most:.2f}: there is nothing to tell apart.</p>\n"
    yield '</div>\n<div class="text">'
    for place, token in enumerate(costs.tokens):
        if token.gap:
            yield f'<span class="gap">{_marked(token.gap)}</span>'
        share = (costs.means[place] - least) / (most - least) if most > least else 0.0
        title = escape(_title(costs, place)).replace("\n", "&#10;")
        yield f'<span class="h{round(share * (SHADES - 1))}" title="{title}">{_shown(token)}</span>'
    yield "</div>\n"


def _title(costs: TokenCosts, place: int) -> str:
    """The lines that appear under the pointer; repr makes characters visible that a tooltip would swallow."""
    token = costs.tokens[place]
    stands_for = f"a part of {token.text!r}" if token.shared else repr(token.text or token.piece)
    by_layer = ", ".join(f"{layer.layer}: {layer.visited[place]}" for layer in costs.layers)
    lines = [
        f"{stands_for}, piece {token.piece!r}, id {token.id}",
        f"{costs.means[place]:.2f} FFN experts, mean over layers",
        f"by layer {by_layer}",
    ]
    if any(layer.kinds for layer in costs.layers):
        sums: dict[str, int] = {}
        for layer in costs.layers:
            for kind, counts in layer.kinds.items():
                sums[kind] = sums.get(kind, 0) + counts[place]
        lines.append("zero-computation, all layers: " + ", ".join(f"{count} {kind}" for kind, count in sums.items()))
    return "\n".join(lines)


def _tables(costs: TokenCosts) -> Iterable[str]:
    """The two ends of the vocabulary's entries; nothing where all cost the same."""
    entries = costs.entries()
    if entries[0].mean == entries[-1].mean:
        return
    rows = min(TABLE_ROWS, len(entries) // 2)
    dearest = sorted(entries, key=lambda entry: (-entry.mean, -entry.count, entry.token.id))
    yield '<h2>Most and least expensive tokens</h2>\n<div class="side">\n'
    yield from _table("most expensive", dearest[:rows])
    yield from _table("least expensive", entries[:rows])
    yield f'</div>\n<p class="note">Means over the occurrences; {len(entries):,} different tokens in all.</p>\n'


def _table(caption: str, entries: Iterable[EntryCost]) -> Iterable[str]:
    yield f'<table>\n<caption>{caption}</caption>\n<tr><th class="first">token</th><th>id</th>'
    yield "<th>occurrences</th><th>FFN experts</th></tr>\n"
    for entry in entries:
        yield f'<tr><td class="first"><code>{_shown(entry.token, in_line=True)}</code></td><td>{entry.token.id}</td>'
        yield f"<td>{entry.count:,}</td><td>{entry.mean:.2f}</td></tr>\n"
    yield "</table>\n"


def _layer_bars(costs: TokenCosts) -> Iterable[str]:
    most = max(layer.mean for layer in costs.layers)
    yield '<h2>FFN experts per token, by layer</h2>\n<table class="wide">\n'
    yield '<tr><th class="first">layer</th><th></th><th>mean</th><th>experts</th></tr>\n'
    for layer in costs.layers:
        parts = [("ffn", layer.mean / most if most else 0.0)]
        yield f'<tr><td class="first">{layer.layer}</td><td class="bar">{_bar(parts)}</td>'
        yield f"<td>{layer.mean:.2f}</td><td>{layer.experts}</td></tr>\n"
    yield f'</table>\n<p class="note">Bars begin at 0 and are full at {most:.2f}.</p>\n'


def _free_bars(costs: TokenCosts) -> Iterable[str]:
    """Shares of the zero-computation experts; nothing for a model without any."""
    kinds = [kind for kind in ("zero", "copy", "constant") if any(kind in layer.kinds for layer in costs.layers)]
    if not kinds:
        return
    names = ["ffn", *kinds]
    keys = "".join(f'<span class="key {name}"></span>{_kind_name(name)}' for name in names)
    yield f"<h2>Where the tokens went, by layer</h2>\n<p>Share of the (token, expert) pairs {keys}</p>\n"
    heads = "".join(f"<th>{_kind_name(name)}</th>" for name in names)
    yield f'<table class="wide">\n<tr><th class="first">layer</th><th></th>{heads}</tr>\n'
    for layer in costs.layers:
        shares = _shares(layer, names)
        cells = "".join(f"<td>{share:.1%}</td>" for _, share in shares)
        yield f'<tr><td class="first">{layer.layer}</td><td class="bar">{_bar(shares)}</td>{cells}</tr>\n'
    yield "</table>\n"


def _shares(layer: LayerCosts, names: Iterable[str]) -> list[tuple[str, float]]:
    kinds = layer.kind_shares()
    rest = 1 - sum(kinds.values()) if any(layer.visited) else 0.0
    return [(name, rest if name == "ffn" else kinds.get(name, 0.0)) for name in names]


def _kind_name(name: str) -> str:
    return "FFN" if name == "ffn" else name


def _bar(parts: Iterable[tuple[str, float]]) -> str:
    cells = "".join(f'<div class="{name}" style="width:{share:.2%}"></div>' for name, share in parts)
    return f'<div class="track">{cells}</div>'


def _shown(token: Token, *, in_line: bool = False) -> str:
    """Its part of the text; its piece where it has none to itself."""
    if token.shared or not token.text:
        return f'<span class="part">{_marked(token.piece, in_line=in_line)}</span>'
    return _marked(token.text, in_line=in_line)


def _in_line(text: str) -> str:
    """A name or sentence of ours; spaces are as they are, anything else that is not seen is marked without markup."""
    return escape(" ".join("".join(part for part, _ in visible(word, in_line=True)) for word in text.split(" ")))


def _marked(text: str, *, in_line: bool = False) -> str:
    parts = visible(text, in_line=in_line)
    return "".join(f'<span class="mark">{part}</span>' if mark else escape(part) for part, mark in parts)


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}M" if count < 1e9 else f"{count / 1e9:,.2f}B"
