"""The routing code beside exported weights: the library's files, the chosen methods' alone, in a package of its own."""

import ast
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.hf import code
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.routers import GATES, RULES
from tests.hf_checkpoints import ARGS, make, megatron_weights, write_checkpoint

LIBRARY = Path(code.__file__).parents[1]
PAIRS = [("softmax", "top-p"), ("tanh", "top-k"), ("cosine", "top-any")]
COMMON = {"errors", "ranges", "losses", "settings", "controller", "registry", "router_config", "routing", "route"}
COMMON |= {"linear", *(f"{name}_dynmoe" for name in ("configuration", "router", "free_experts", "modeling"))}


@pytest.fixture(scope="module", autouse=True)
def a_method():
    """The gate and rule of a package outside of the library, for this module."""
    importlib.import_module("tests.hf.a_method")
    yield
    del GATES["biased"], RULES["floor"], sys.modules["tests.hf.a_method"]


def without_imports(source: str) -> list[str]:
    """The lines of a file that are no import."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return [line for line in lines if line is not None]


def origin(name: str) -> Path:
    """The library's file of a copied one."""
    if "_dynmoe" in name:
        return LIBRARY / "hf" / name
    if name.startswith("a_"):
        return Path(__file__).parent / name
    shared = LIBRARY / "routers" / name
    return shared if shared.exists() else LIBRARY / name


@pytest.mark.parametrize(("gate", "rule"), [*PAIRS, ("biased", "floor")])
def test_the_files_are_the_librarys_but_for_import_lines(gate: str, rule: str) -> None:
    for name, source in code.sources(gate, rule).items():
        assert without_imports(source) == without_imports(origin(name).read_text()), name
        for node in ast.walk(ast.parse(source, feature_version=(3, 10))):  # that of transformers 5
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and (node.module or "").partition(".")[0] not in ("megatron_dynmoe", "tests")
            if isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] in {*sys.stdlib_module_names, "torch"} for alias in node.names)


@pytest.mark.parametrize(
    ("gate", "rule", "own"),
    [
        ("softmax", "top-p", {"softmax", "top_p"}),
        ("tanh", "top-k", {"tanh", "softmax", "top_k"}),  # its settings and loss are softmax's
        ("cosine", "top-any", {"cosine", "top_any", "auxiliary"}),
        ("biased", "floor", {"a_method", "a_helper"}),
    ],
)
def test_only_the_chosen_methods_come_along(gate: str, rule: str, own: set[str]) -> None:
    files = {name.removesuffix(".py") for name in code.sources(gate, rule)}
    # losses come with whoever has one
    assert files - {"losses"} == (COMMON | own) - {"losses"}


ALONE = """
import sys
from importlib.abc import MetaPathFinder

class No(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron_dynmoe", "megatron", "tests"):
            raise ModuleNotFoundError(f"{name} is not to be found here", name=name)

sys.meta_path.insert(0, No())
import torch
from transformers import AutoModelForCausalLM

tokens = torch.arange(20).reshape(2, 10)
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    model.save_pretrained(name + "-again")
    again = AutoModelForCausalLM.from_pretrained(name + "-again", trust_remote_code=True)
    logits = model(tokens).logits
    assert torch.equal(again(tokens).logits, logits), name
    torch.save(logits.detach(), name + ".pt")
"""


def checkpoint(folder: Path, gate: str, rule: str) -> Path:
    """A checkpoint of these methods with random weights."""
    columns, width = ARGS["num_experts"], ARGS["hidden_size"]
    changes = {"moe_gate": gate, "moe_rule": rule, "moe_floor": 0.3, "moe_cosine_scale": 3.0}
    args = Namespace(**(ARGS | changes))
    weights, draw = megatron_weights(args), torch.Generator().manual_seed(1)
    extra = {
        "tanh": {"weight": (columns, 8 * columns), "hidden_weight": (8 * columns, width)},
        "top-any": {"thresholds": (columns,)},
        "biased": {"bias": (columns,)},
    }
    for name, shape in (extra.get(gate, {}) | extra.get(rule, {})).items():
        weights[f"decoder.layers.mlp.router.{name}"] = torch.randn(2, *shape, generator=draw)
    if rule == "floor":
        weights["decoder.layers.mlp.router.floor"] = torch.tensor([0.05, 0.6])
        weights["decoder.layers.mlp.router.floor_error"] = torch.zeros(2)
    return write_checkpoint(folder, args, weights)


def test_exports_of_all_methods_load_in_one_process_without_this_package(tmp_path: Path) -> None:
    pairs = [*PAIRS, ("biased", "floor")]
    names = [f"{gate}-{rule}" for gate, rule in pairs]
    tokens, wanted = torch.arange(20).reshape(2, 10), {}
    for name, pair in zip(names, pairs, strict=True):
        # all of them in folders of one name, as where people export to `out`
        folder = tmp_path / name / "out"
        export(checkpoint(tmp_path / f"save-{name}", *pair), folder, progress=False)
        wanted[name] = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(tokens).logits
    folders = [str(tmp_path / name / "out") for name in names]
    command = [sys.executable, "-c", ALONE, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, folder in zip(names, folders, strict=True):
        assert torch.equal(torch.load(f"{folder}.pt"), wanted[name]), name
        # saved again from what was loaded: the same files
        again = {path.name: path.read_bytes() for path in Path(f"{folder}-again").glob("*.py")}
        assert again == {path.name: path.read_bytes() for path in Path(folder).glob("*.py")}


def test_a_setting_that_training_moved_is_exported_as_it_stands(tmp_path: Path) -> None:
    export(checkpoint(tmp_path / "save", "biased", "floor"), tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["floor"] == 0.3 and "floor_coeff" not in config
    assert config["moved_settings"] == {"floor": pytest.approx([0.05, 0.6])}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    outputs = model(torch.arange(20).reshape(2, 10), output_routing_map=True, output_router_logits=True)
    for map_TE, logits_TE, floor in zip(outputs.routing_map, outputs.router_logits, (0.05, 0.6), strict=True):
        passed_TE = logits_TE.softmax(-1) > floor
        none_T = ~passed_TE.any(-1)
        assert torch.equal(map_TE[~none_T], passed_TE[~none_T])
        assert (map_TE.sum(-1)[none_T] == 1).all()
    assert none_T.any(), "at 0.6 some tokens pass nowhere"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("decoder.layers.mlp.router.floor", torch.tensor([0.1, float("nan")]), "floor of layer 1 .* no finite number"),
        ("decoder.layers.mlp.router.floor", None, None),
        ("decoder.layers.mlp.router.other", torch.zeros(2), "knows no place for decoder.layers.mlp.router.other"),
    ],
)
def test_state_of_controllers_is_read_or_refused(tmp_path: Path, key: str, value, sentence: str | None) -> None:
    args = Namespace(**(ARGS | {"moe_rule": "floor", "moe_floor": 0.3}))
    weights = megatron_weights(args) | ({} if value is None else {key: value})
    save = write_checkpoint(tmp_path / "save", args, weights)
    if sentence is None:  # the controller was off
        export(save, tmp_path / "out", progress=False)
        assert json.loads((tmp_path / "out/config.json").read_text())["moved_settings"] is None
        return
    with pytest.raises(CheckpointError, match=sentence):
        export(save, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import numpy", "import numpy"),
        ("from numpy import array", "from numpy import array"),
        ("import megatron_dynmoe.routers.linear", "import megatron_dynmoe.routers.linear"),
        ("from megatron_dynmoe.config import DynMoEConfig", "from megatron_dynmoe.config import DynMoEConfig"),
        ("from megatron_dynmoe import routers", "from megatron_dynmoe import routers"),
        ("from megatron_dynmoe.routers import linear", "from megatron_dynmoe.routers import linear"),
        ("from . import helper", "from . import helper"),
    ],
)
def test_what_cannot_come_along_is_refused_by_file_and_import(
    tmp_path: Path, monkeypatch, line: str, said: str
) -> None:
    package = tmp_path / "of_a_stranger"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").touch()
    (package / "method.py").write_text(
        f"{line}\nfrom megatron_dynmoe.routers import register_rule\n\n"
        "@register_rule('strange')\ndef strange(scores_TE, config):\n    return scores_TE > 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_a_stranger.method")
    save, _ = make(tmp_path / "save", moe_rule="strange")
    try:
        with pytest.raises(CheckpointError) as error:
            export(save, tmp_path / "out", progress=False)
    finally:
        del RULES["strange"]
        for name in ("of_a_stranger", "of_a_stranger.method", "of_a_stranger.helper"):
            sys.modules.pop(name, None)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "method.py" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_gradients_are_those_of_the_training(tmp_path: Path) -> None:
    """Fine-tuning reaches the thresholds of top-any, whose choice has no gradient of its own."""
    export(checkpoint(tmp_path / "save", "cosine", "top-any"), tmp_path / "out", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
    tokens = torch.arange(20).reshape(2, 10)
    outputs = model(tokens, labels=tokens, output_routing_map=True)
    assert all(map_TE.any(-1).all() for map_TE in outputs.routing_map)  # evaluation's choice, also in training
    outputs.loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.router.thresholds.grad.abs().sum() > 0
        assert layer.mlp.router.weight.grad.abs().sum() > 0
