"""The tool that writes the page of token costs, on small real models."""

import json
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dynmoe.hf.configuration_dynmoe import DynMoEHFConfig
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM
from megatron_dynmoe.programs import token_report
from megatron_dynmoe.report.token_costs import LayerCosts
from tests.hf.test_hf_export import train_tokenizer
from tests.hf.test_hf_model import small_model
from tests.hf_checkpoints import ARGS, megatron_weights, write_checkpoint
from tests.token_page_parser import Page

ROOT = Path(__file__).resolve().parents[2]


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
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    save = write_checkpoint(tmp_path / "save", Namespace(**ARGS), megatron_weights(Namespace(**ARGS), rows=384))
    argv = ["--model", save, "--tokenizer-model", tokenizer_model, "--text", TEXT]
    code, err = run(*argv, "--output", tmp_path / "page.html")
    assert code == 0, err
    assert not [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("token_report.")]
    from megatron_dynmoe.programs.export_hf import write_tokenizer

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
    assert code == 1 and sentence.startswith("token_report: ") and "Traceback" not in err
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


def test_refusals_of_models(small, tokenizer_model, tmp_path, run) -> None:
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
