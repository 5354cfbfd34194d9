"""The page of token costs: hand-made maps to exact numbers, what the page holds, and the tool on small real models."""

import json
import re
import signal
import subprocess
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dynmoe.hf.configuration_dynmoe import DynMoEHFConfig
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM
from megatron_dynmoe.report.token_costs import FREE_KINDS, LayerCosts, token_costs
from megatron_dynmoe.report.token_page import PageHead, token_page
from megatron_dynmoe.report.token_style import SHADES, STYLE
from megatron_dynmoe.report.token_text import Token, tokens_of_text, visible
from tests.hf_checkpoints import ARGS, megatron_weights, write_checkpoint
from tests.test_hf_export import train_tokenizer
from tests.test_hf_model import small_model
from tools import token_report

ROOT = Path(__file__).resolve().parent.parent

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


class Page(HTMLParser):
    """What a page holds: its text, the shaded tokens, and every attribute; refuses tags that do not match."""

    VOID = frozenset({"meta"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self.tokens: list[dict[str, str]] = []
        self.depth = 0  # of the token that is open
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if "title" in dict(attrs):
            self.tokens.append({"text": "", **dict(attrs)})
            self.depth = len(self.open)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if len(self.open) < self.depth:
            self.depth = 0

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.depth:
            self.tokens[-1]["text"] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag != "style").split())


def as_nested(maps):
    return maps


def as_tensors(maps):
    return [torch.tensor(rows, dtype=torch.bool) for rows in maps]


@pytest.mark.parametrize("form", [as_nested, as_tensors])
def test_costs(form) -> None:
    costs = token_costs(TOKENS, form(MAPS), layers=[0, 2], free_maps=form(FREE_MAPS), free_experts=FREE)
    assert costs.layers == (
        LayerCosts(0, experts=4, visited=(1, 2, 1, 4), free={"constant": (2, 0, 0, 0), "zero": (0, 1, 0, 1)}),
        LayerCosts(2, experts=5, visited=(2, 3, 1, 1), free={"constant": (0, 0, 1, 0), "zero": (0, 0, 1, 0)}),
    )
    assert costs.means == (1.5, 2.5, 1.0, 2.5)
    assert [layer.mean for layer in costs.layers] == [2.0, 1.75]
    assert (costs.mean, costs.share, costs.idle_experts) == (1.875, 3.75 / 9, 5.25)
    # of the 12 pairs of layer 0, 8 are with FFN experts; of the 9 of layer 2, 7
    assert costs.layers[0].free_shares() == {"constant": 2 / 12, "zero": 2 / 12}
    assert costs.layers[1].free_shares() == {"constant": 1 / 9, "zero": 1 / 9}
    entries = [(entry.token.piece, entry.count, entry.mean) for entry in costs.entries()]
    assert entries == [("<0x0A>", 1, 1.0), ("a", 1, 1.5), ("▁b", 2, 2.5)]


def test_columns_of_free_experts_come_in_the_order_of_the_maps() -> None:
    assert FREE_KINDS == ("constant", "copy", "zero")
    free = {"zero": 1, "copy": 2, "constant": 1}
    costs = token_costs([Token(0, "x", "x")], [[[1]]], free_maps=[[[1, 0, 1, 0]]], free_experts=free)
    assert costs.layers[0].free == {"constant": (1,), "copy": (1,), "zero": (0,)}


@pytest.mark.parametrize(
    ("tokens", "maps", "more", "part"),
    [
        ([], [[]], {}, "0 tokens"),
        (TOKENS, [], {}, "0 MoE layers"),
        (TOKENS, [MAPS[0][:3]], {}, "layer 0 has 3 rows for 4 tokens"),
        (TOKENS, MAPS, {"layers": [0]}, "2 maps are of 1 layers"),
        (TOKENS, MAPS, {"free_maps": FREE_MAPS, "free_experts": {"zero": 2}}, "layer 0 is 4 by 3; .* by 2 experts"),
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
    page = page_of(free_maps=FREE_MAPS, free_experts=FREE)
    assert "Share of the (token, expert) pairs FFN zero constant layer FFN zero constant" in page.text
    assert "0 66.7% 16.7% 16.7% 1 77.8% 11.1% 11.1%" in page.text
    assert "copy" not in page.text
    assert page.tokens[0]["title"].endswith("\nzero-computation, all layers: 2 constant, 0 zero")
    # a token that is with no FFN expert at all costs nothing
    idle = page_of(TOKENS[:1], [[[0, 0]]], free_maps=[[[0, 0, 1]]], free_experts=FREE)
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


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer_model) -> tuple[Path, DynMoEForCausalLM]:
    """A model of three layers, the second dense, as an exported folder and in memory."""
    from megatron_dynmoe.data.hf_tokenizer import to_hf_tokenizer

    folder = tmp_path_factory.mktemp("small")
    model = small_model(vocab_size=300)
    DynMoEHFConfig.register_for_auto_class()
    DynMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(folder)
    to_hf_tokenizer(tokenizer_model, folder)
    return folder, model


@pytest.fixture
def run(capsys):
    """The tool on given arguments -> (exit code, stderr); it takes over SIGTERM, which is given back."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*argv):
        code = token_report.main(list(map(str, argv)))
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    yield call
    signal.signal(signal.SIGTERM, before)


TEXT = "the state of\r\n\tline <b> 9 é & the rest\n"


def test_tool_shows_what_the_model_did(small, tmp_path, run) -> None:
    folder, model = small
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    output = tmp_path / "new" / "page.html"
    code, err = run("--model", folder, "--text-file", tmp_path / "text.txt", "--window", 7, "--output", output)
    assert code == 0 and "token/s" in err
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    page = Page(output.read_text(encoding="utf-8"))
    ids = [int(re.search(r", id (\d+)\n", token["title"])[1]) for token in page.tokens]
    counts = [[], []]
    for start in range(0, len(ids), 7):
        with torch.no_grad():
            maps = model(torch.tensor([ids[start : start + 7]]), output_routing_map=True).routing_map
        for found, layer in zip(counts, maps, strict=True):
            found += layer.sum(-1).tolist()
    shown = [token["title"].splitlines()[2] for token in page.tokens]
    assert shown == [f"by layer 0: {a}, 2: {b}" for a, b in zip(*counts, strict=True)]
    assert len(set(shown)) > 3, "the model tells no tokens apart"
    assert f"in {-(-len(ids) // 7)} windows of up to 7" in page.text
    text = "".join(token["text"] for token in page.tokens)
    assert text == TEXT.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥\t").replace("é", "<0xC3><0xA9>")
    total = sum(p.numel() for p in model.parameters())
    idle = sum(6 - sum(layer) / len(layer) for layer in counts) * sum(
        p.numel() for p in model.model.layers[0].mlp.experts[0].parameters()
    )
    assert f"({(total - idle) / total:.1%})" in page.text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"router_rule": "top-k"}, "rule top-k, k = 2; gate softmax"),
        ({"router_rule": "top-any", "router_gate": "cosine"}, "rule top-any; gate cosine"),
        ({"max_experts_per_token": 3}, "rule top-p, p = 0.4; gate softmax; at most 3 experts per token"),
    ],
)
def test_rule_in_words(rule, words) -> None:
    assert token_report.rule_in_words(small_model(**rule).config) == words


class FreeModel:
    """Answers as a model with zero-computation experts does: the map of the FFN experts is the parity of the token."""

    device = "cpu"

    def __init__(self, **experts) -> None:
        self.config = SimpleNamespace(
            vocab_size=300, moe_layers=[0, 1], router_rule="top-k", num_experts_per_tok=2, top_p_threshold=0.4,
            max_experts_per_token=None, **experts,
        )  # fmt: skip
        self.asked: list[set[str]] = []

    def __call__(self, ids, **wanted):
        self.asked.append({name for name, value in wanted.items() if name.startswith("output_") and value})
        odd = ids[0] % 2 == 1
        free = torch.stack([~odd, ids[0] % 3 == 0], dim=-1)
        return {"routing_map": (torch.stack([odd, odd], dim=-1),), "free_routing_map": (free,)}


def test_free_maps_are_asked_for_where_there_are_any(small) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small[0], trust_remote_code=True)
    ids = tokenizer(TEXT)["input_ids"]
    plain, mixed = FreeModel(), FreeModel(constant_experts=1, zero_experts=1)
    costs = token_report.costs_of_text(TEXT, tokenizer, plain, window=5)
    assert costs.layers == (LayerCosts(1, 2, tuple(2 * (i % 2) for i in ids)),)
    costs = token_report.costs_of_text(TEXT, tokenizer, mixed, window=5)
    free = {"constant": tuple(1 - i % 2 for i in ids), "zero": tuple(int(i % 3 == 0) for i in ids)}
    assert costs.layers == (LayerCosts(1, 2, tuple(2 * (i % 2) for i in ids), free),)
    assert plain.asked == [{"output_routing_map"}] * -(-len(ids) // 5)
    assert mixed.asked == [{"output_routing_map", "output_free_routing_map"}] * -(-len(ids) // 5)
    assert token_report.rule_in_words(mixed.config).endswith("zero-computation experts: 1 constant, 1 zero")


def test_tool_on_a_checkpoint(tokenizer_model, tmp_path, run, monkeypatch) -> None:
    """The page is that of the exported model, but for the name; the export does not stay."""
    monkeypatch.syspath_prepend(ROOT / "tools")  # where Python finds export_hf when the tool runs as a program
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    save = write_checkpoint(tmp_path / "save", Namespace(**ARGS), megatron_weights(Namespace(**ARGS), rows=384))
    argv = ["--model", save, "--tokenizer-model", tokenizer_model, "--text", TEXT]
    code, err = run(*argv, "--output", tmp_path / "page.html")
    assert code == 0, err
    assert not [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("token_report.")]
    from export_hf import write_tokenizer

    out = tmp_path / "exported"
    export(save, out, tokenizer_model=tokenizer_model, write_tokenizer=write_tokenizer, progress=False)
    code, _ = run("--model", out, "--text", TEXT, "--output", tmp_path / "other.html")
    assert code == 0
    page, other = ((tmp_path / name).read_text(encoding="utf-8") for name in ("page.html", "other.html"))
    assert f"<h1>{save / 'iter_0000003'}</h1>" in page
    assert page.replace(str(save / "iter_0000003"), str(out)) == other


def refused(run, argv, parts) -> None:
    """Exit code 2, and a last line with all ``parts``; only bars of progress may come before it."""
    code, err = run(*argv)
    sentence = err.rstrip("\n").rsplit("\n", 1)[-1]
    assert code == 2 and sentence.startswith("token_report: ") and "Traceback" not in err
    assert all(part in sentence for part in parts), err


def test_refusals(small, tokenizer_model, tmp_path, run) -> None:
    folder, _ = small
    page, text = tmp_path / "page.html", tmp_path / "text.html"
    text.write_text("the state")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder.html").mkdir()
    good = ["--model", folder, "--text", "the", "--output", page]
    cases = [
        ([*good, "--output", tmp_path / "page.txt"], ["--output", "'.txt'", ".html"]),
        ([*good, "--output", tmp_path / "folder.html"], ["folder.html is a folder"]),
        ([*good, "--output", text / "page.html"], [str(text), "cannot be written"]),
        ([*good, "--window", 0], ["--window is 0", "1 to 64"]),
        ([*good, "--window", 65], ["--window is 65", "1 to 64"]),
        ([*good, "--tokenizer-model", tokenizer_model], ["--tokenizer-model", "exported model"]),
        ([*good, "--model", tmp_path / "no"], [str(tmp_path / "no"), "is no folder"]),
        ([*good, "--model", tmp_path], ["no config.json", "--tokenizer-model"]),
        (["--model", folder, "--text", "", "--output", page], ["no tokens"]),
        (["--model", folder, "--text", "\udcff", "--output", page], ["--text is not text in UTF-8"]),
    ]
    sources = {
        "no.txt": ["cannot be read", "No such file"],
        "bytes.txt": ["not text in UTF-8"],
        "empty.txt": ["no tokens"],
    }
    for name, parts in sources.items():
        cases.append((["--model", folder, "--text-file", tmp_path / name, "--output", page], parts))
    cases.append((["--model", folder, "--text-file", text, "--output", text], ["is the text itself"]))
    for argv, parts in cases:
        refused(run, argv, parts)
    assert text.read_text() == "the state"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.txt", "empty.txt", "folder.html", "text.html"]


def test_refusals_of_models(small, tokenizer_model, tmp_path, run, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    folder, _ = small
    config = json.loads((folder / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    argv = ["--model", other, "--text", "the", "--output", tmp_path / "page.html"]

    def write(fields) -> None:
        (other / "config.json").write_text(json.dumps(fields))

    refused(run, [*argv, "--tokenizer-model", tokenizer_model], [str(other)])  # neither model nor checkpoint
    write([])
    refused(run, argv, ["config.json", "model_type"])
    write(config | {"model_type": "llama"})
    refused(run, argv, ["config.json", "'llama'", "'dynmoe'"])
    write(config)
    refused(run, argv, ["tokenizer.json is missing"])
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (other / path.name).write_bytes(path.read_bytes())
    refused(run, argv, [str(other), "cannot be loaded"])  # no weights
    (other / "model.safetensors").write_bytes(b"not weights")
    refused(run, argv, [str(other), "cannot be loaded"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_tokens_beyond_the_vocabulary_are_refused(small) -> None:
    from transformers import AutoTokenizer

    model = FreeModel()
    model.config.vocab_size = 20
    tokenizer = AutoTokenizer.from_pretrained(small[0], trust_remote_code=True)
    with pytest.raises(token_report.ReportError, match="vocabulary of 20"):
        token_report.costs_of_text(TEXT, tokenizer, model, window=5)


def test_interrupted_tool_leaves_the_page_as_it_was(small, tmp_path, run, monkeypatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    page = tmp_path / "page.html"
    page.write_text("before")
    monkeypatch.setattr(token_report, "costs_of_text", interrupt)
    code, err = run("--model", small[0], "--text", "the", "--output", page)
    assert code == 130 and err.endswith(f"interrupted; {page} is as it was.\n")
    assert page.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_replaced_stays(tmp_path, monkeypatch) -> None:
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    page = tmp_path / "page.html"
    page.write_text("before")
    monkeypatch.setattr(token_report.os, "replace", refuse)
    with pytest.raises(token_report.ReportError, match=r"page\.html cannot be written \(Permission denied\)"):
        token_report.write(page, "after")
    assert page.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_report_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, tools.token_report; print(*{'torch', 'transformers', 'megatron', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
