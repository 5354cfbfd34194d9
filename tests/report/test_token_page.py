"""The page of token costs: hand-made maps to exact numbers, and what the page holds."""

import re

import pytest
import torch

from megatron_dynmoe.report.token_costs import KINDS, LayerCosts, token_costs
from megatron_dynmoe.report.token_page import PageHead, token_page
from megatron_dynmoe.report.token_style import SHADES, STYLE
from megatron_dynmoe.report.token_text import Token, tokens_of_text, visible
from tests.token_page_parser import Page

# Four tokens, the second and the last of one entry; two MoE layers, the second of which has an expert more.
TOKENS = [Token(7, "a", "a"), Token(9, "▁b", " b"), Token(3, "<0x0A>", "\n"), Token(9, "▁b", " b")]
MAPS = [
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]],
    [[1, 0, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]],
]
# Columns: two constant experts, no copy expert, one zero expert.
FREE_MAPS = [[[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0]]]
FREE = {"constant": 2, "copy": 0, "zero": 1}
HEAD = PageHead(model="small", rule="rule top-p, p = 0.4", parameters=1_000_000, expert_parameters=100_000, window=64)


def as_nested(maps):
    return maps


def as_tensors(maps):
    return [torch.tensor(rows, dtype=torch.bool) for rows in maps]


@pytest.mark.parametrize("form", [as_nested, as_tensors])
def test_costs(form) -> None:
    costs = token_costs(TOKENS, form(MAPS), layers=[0, 2], maps_TZ=form(FREE_MAPS), experts_of_kind=FREE)
    assert costs.layers == (
        LayerCosts(0, experts=4, visited=(1, 2, 1, 4), kinds={"constant": (2, 0, 0, 0), "zero": (0, 1, 0, 1)}),
        LayerCosts(2, experts=5, visited=(2, 3, 1, 1), kinds={"constant": (0, 0, 1, 0), "zero": (0, 0, 1, 0)}),
    )
    assert costs.means == (1.5, 2.5, 1.0, 2.5)
    assert [layer.mean for layer in costs.layers] == [2.0, 1.75]
    assert (costs.mean, costs.share, costs.idle_experts) == (1.875, 3.75 / 9, 5.25)
    # of the 12 pairs of layer 0, 8 are with FFN experts; of the 9 of layer 2, 7
    assert costs.layers[0].kind_shares() == {"constant": 2 / 12, "zero": 2 / 12}
    assert costs.layers[1].kind_shares() == {"constant": 1 / 9, "zero": 1 / 9}
    entries = [(entry.token.piece, entry.count, entry.mean) for entry in costs.entries()]
    assert entries == [("<0x0A>", 1, 1.0), ("a", 1, 1.5), ("▁b", 2, 2.5)]


def test_columns_of_free_experts_come_in_the_order_of_the_maps() -> None:
    assert KINDS == ("constant", "copy", "zero")
    free = {"zero": 1, "copy": 2, "constant": 1}
    costs = token_costs([Token(0, "x", "x")], [[[1]]], maps_TZ=[[[1, 0, 1, 0]]], experts_of_kind=free)
    assert costs.layers[0].kinds == {"constant": (1,), "copy": (1,), "zero": (0,)}


@pytest.mark.parametrize(
    ("tokens", "maps", "more", "part"),
    [
        ([], [[]], {}, "0 tokens"),
        (TOKENS, [], {}, "0 MoE layers"),
        (TOKENS, [MAPS[0][:3]], {}, "layer 0 has 3 rows for 4 tokens"),
        (TOKENS, MAPS, {"layers": [0]}, "2 maps are of 1 layers"),
        (TOKENS, MAPS, {"maps_TZ": FREE_MAPS, "experts_of_kind": {"zero": 2}}, "layer 0 is 4 by 3; .* by 2 experts"),
    ],
)
def test_costs_of_maps_that_do_not_fit(tokens, maps, more, part) -> None:
    with pytest.raises(ValueError, match=part):
        token_costs(tokens, maps, **more)


def test_tokens_of_a_text() -> None:
    """A special token, a dropped space, and a character of two bytes between two that have their own token."""
    found = tokens_of_text(
        "ab  éc", ids=[1, 5, 20, 21, 6], pieces=["<s>", "ab", "<0xC3>", "<0xA9>", "c"],
        spans=[(0, 0), (0, 2), (4, 5), (4, 5), (5, 6)],
    )  # fmt: skip
    assert found == (
        Token(1, "<s>", ""),
        Token(5, "ab", "ab"),
        Token(20, "<0xC3>", "é", shared=True, gap="  "),
        Token(21, "<0xA9>", "é", shared=True),
        Token(6, "c", "c"),
    )


def test_every_character_leaves_something_to_see() -> None:
    text = "a b\n\t\r\x00\u202ec"
    marks = [("⏎", True), ("\n", False), ("⇥", True), ("\t", False), ("␍", True), ("␀", True), ("U+202E", True)]
    assert list(visible(text)) == [("a b", False), *marks, ("c", False)]
    assert "".join(part for part, _ in visible(text, in_line=True)) == "a␣b⏎⇥␍␀U+202Ec"


def page_of(tokens=TOKENS, maps=MAPS, *, head=HEAD, **more) -> Page:
    html = token_page(token_costs(tokens, maps, **more), head)
    assert html.startswith("<!DOCTYPE html>")
    return Page(html)


def test_page() -> None:
    page = page_of(layers=[0, 2])
    assert [token["text"] for token in page.tokens] == ["a", " b", "⏎\n", " b"]
    # 1.0 is the first shade, 2.5 the last, and 1.5 lies a third of the way between
    assert [token["class"] for token in page.tokens] == ["h5", "h15", "h0", "h15"]
    assert SHADES == 16 and all(f".h{step} {{" in STYLE for step in range(SHADES))
    assert page.tokens[1]["title"] == (
        "' b', piece '▁b', id 9\n2.50 FFN experts, mean over layers\nby layer 0: 2, 2: 3"
    )
    assert page.tokens[2]["title"].startswith(r"'\n', piece '<0x0A>', id 3")
    for part in (
        "small rule top-p, p = 0.4 tokens 4 ",
        "FFN experts per token and layer 1.88 of 4 to 5",
        "share of the FFN experts 41.7%",
        "activated parameters 0.5M of 1.0M (47.5%)",  # 5.25 experts of 100,000 idle
        "FFN experts, mean over layers 1.00 1.75 2.50",
        "most expensive token id occurrences FFN experts ␣ b 9 2 2.50 least expensive",
        "least expensive token id occurrences FFN experts ⏎ 3 1 1.00 Means",
        "3 different tokens",
        "layer mean experts 0 2.00 4 2 1.75 5 Bars begin at 0 and are full at 2.00.",
    ):
        assert part in page.text, page.text
    assert "zero" not in page.text and "window" not in page.text
    widths = [value for _, name, value in page.attributes if name == "style"]
    assert widths == ["width:100.00%", "width:87.50%"]


def test_page_of_a_model_with_zero_computation_experts() -> None:
    page = page_of(maps_TZ=FREE_MAPS, experts_of_kind=FREE)
    assert "Share of the (token, expert) pairs FFN zero constant layer FFN zero constant" in page.text
    assert "0 66.7% 16.7% 16.7% 1 77.8% 11.1% 11.1%" in page.text
    assert "copy" not in page.text
    assert page.tokens[0]["title"].endswith("\nzero-computation, all layers: 2 constant, 0 zero")
    # a token that is with no FFN expert at all costs nothing
    idle = page_of(TOKENS[:1], [[[0, 0]]], maps_TZ=[[[0, 0, 1]]], experts_of_kind=FREE)
    assert "0.00 of 2" in idle.text and "0 0.0% 100.0% 0.0%" in idle.text


def test_page_says_how_the_text_was_cut() -> None:
    page = page_of(head=PageHead("m", "r", 1_000_000, 1, window=3))
    assert "read in 2 windows of up to 3 tokens" in page.text


def test_page_where_all_cost_the_same_ranks_nothing() -> None:
    page = page_of(maps=[[[1, 0]] * 4])
    assert "Every token uses 1.00" in page.text and "expensive" not in page.text
    assert {token["class"] for token in page.tokens} == {"h0"}


def test_page_is_one_file_and_takes_no_text_for_markup() -> None:
    evil = '</div><script src="http://x.example/a.js">&amp;"\'</script>'
    tokens = [Token(0, evil, evil), Token(1, evil, "é", shared=True), Token(2, evil, "", gap=evil), Token(3, "b", "b")]
    page = page_of(tokens, head=PageHead(evil, evil, 1_000_000, 1, window=64))
    assert [token["text"] for token in page.tokens] == [evil, evil, evil, "b"]
    assert "a part of 'é', piece " in page.tokens[1]["title"] and repr(evil) in page.tokens[1]["title"]
    assert page.text.startswith(f"Experts per token: {evil} {evil} {evil}")
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base", "a"}
    assert {name for _, name, _ in page.attributes} <= {"class", "title", "style", "lang", "charset", "name", "content"}
    assert not re.search(r"//|url\(|@import|expression", STYLE)
    assert "prefers-color-scheme: dark" in STYLE


def test_shades_keep_the_text_readable() -> None:
    """The contrast of text on the darkest shade is at least WCAG's 4.5 to 1 in both schemes."""
    opacity = float(re.findall(r"\.h15 \{ background: rgb\(var\(--heat\) / ([\d.]+)\)", STYLE)[0])
    values = {name: re.findall(rf"--{name}: ([^;]+);", STYLE) for name in ("page", "ink", "heat")}
    assert [len(found) for found in values.values()] == [2, 2, 2]
    for page, ink, heat in zip(*values.values(), strict=True):
        under, over = hex_channels(page), [int(channel) for channel in heat.split()]
        mixed = [opacity * a + (1 - opacity) * b for a, b in zip(over, under, strict=True)]
        darker, lighter = sorted([luminance(mixed), luminance(hex_channels(ink))])
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def hex_channels(color: str) -> list[int]:
    return [int(color[at : at + 2], 16) for at in (1, 3, 5)]


def luminance(channels: list[float]) -> float:
    """WCAG's relative luminance of an sRGB colour of 0 to 255."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in channels)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
