"""examples/plugin: installed, its methods train under expert parallelism, resume, and are exported."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tests.layouts import LAYOUTS, MODEL

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "plugin"
STOCK = MODEL[: MODEL.index("--moe-preset")]
METHODS = {
    "pi-top-p": "--moe-rule pi-top-p --moe-top-p 0.2 --moe-pi-integral 0.4".split(),
    "relu": "--moe-gate relu --moe-rule relu --moe-relu-l1-coeff 1e-3 --moe-relu-experts 1.5".split(),
}
MOVED = {"pi-top-p": "top_p", "relu": "relu_l1_coeff"}


class Absent:
    """Finds neither the library nor the plug-in, as where an export is used."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in ("megatron", "megatron_dynmoe", "dynmoe_example"):
            raise ModuleNotFoundError(name)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its metadata, as pip puts them; nothing is fetched."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    call([*words, str(folder / "site"), str(source)], folder)
    return folder / "site"


def call(words: list[str], site: Path) -> str:
    """What Python prints, with ``site`` before its own packages and the checkout behind."""
    path = os.pathsep.join([str(site), str(PLUGIN.parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HOME": str(site / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def train(site: Path, argv: list[str]) -> int:
    """A rank with the plug-in installed."""
    sys.path.insert(0, str(site))
    return ranks.pretrain(argv)


def infer(site: Path, argv: list[str], tokens: Path, out: Path) -> int:
    """A rank that loads a checkpoint and writes the model's logits for ``tokens`` [B, S]."""
    from megatron.training import training

    built: list[torch.nn.Module] = []
    setup = training.setup_model_and_optimizer

    def kept(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        built.append(result[0][0])
        return result

    training.setup_model_and_optimizer = kept
    assert train(site, [*argv, "--skip-train"]) == 0
    ids = torch.load(tokens)
    with torch.no_grad():
        torch.save(built[0].eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None), out)
    return 0


def export_and_load(site: Path, words: list[str], model: Path, tokens: Path, out: Path) -> int:
    """Export where the plug-in is installed, then load where nothing is; writes the model's logits."""
    sys.path.insert(0, str(site))
    from megatron_dynmoe.programs.export_hf import main

    assert main([*words, "--output", str(model)]) == 0
    sys.path.remove(str(site))
    sys.meta_path.insert(0, Absent())
    for name in [name for name in sys.modules if name.startswith(("megatron", "dynmoe_example"))]:
        del sys.modules[name]
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(loaded(torch.load(tokens)).logits, out)
    return 0


def flags(name: str, layout: str, folder: Path) -> list[str]:
    places = {"save": "saved", "load": "saved", "moe-metrics-file": "metrics.jsonl"}
    words = [word for flag, place in places.items() for word in (f"--{flag}", str(folder / place))]
    return [*STOCK, *METHODS[name], *LAYOUTS[layout][1].split(), *words, "--save-interval", "100"]


def run(site: Path, name: str, layout: str, folder: Path, until: int) -> None:
    """Train until an iteration, from what ``folder`` has saved."""
    words = [*flags(name, layout, folder), "--exit-interval", str(until)]
    ranks.call(train, site, words, ranks=LAYOUTS[layout][0], folder=folder / f"{layout}-{until}")


@dataclass
class Trained:
    """A method, where its runs are, and their records by iteration."""

    name: str
    site: Path
    folder: Path
    whole: dict[int, dict]
    resumed: dict[int, dict]


def records(folder: Path) -> dict[int, dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["iteration"]: record for record in map(json.loads, lines)}


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three steps on one rank, then three more there, and the same three on two ranks with expert parallelism."""
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    run(installed, request.param, "serial", whole, 3)
    shutil.copytree(whole / "saved", resumed / "saved")
    run(installed, request.param, "ep2", resumed, 6)
    run(installed, request.param, "serial", whole, 6)
    return Trained(request.param, installed, resumed, records(whole), records(resumed))


def test_own_tests_pass(installed: Path) -> None:
    call(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(PLUGIN), str(PLUGIN / "tests")], installed)


def test_a_method_is_one_short_file() -> None:
    for path in (PLUGIN / "dynmoe_example").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 100, path


def test_parallel_and_resumed_equals_one_rank(trained: Trained) -> None:
    moved = MOVED[trained.name]
    start = trained.whole[1][moved]
    assert trained.whole[6][moved] != start, "the controller has moved nothing"
    for iteration in (4, 5, 6):
        one, two = trained.whole[iteration], trained.resumed[iteration]
        # float32 sums in another order, as between layouts (tests/training/test_parallel.py)
        assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=2**-24 * 160)
        assert two["experts_per_token"] == one["experts_per_token"]
        assert two[moved] == one[moved], "a controller's state depends on the layout"
        assert two[f"{moved}_by_layer"] == one[f"{moved}_by_layer"]


def test_what_is_its_own_is_logged(trained: Trained) -> None:
    output = (trained.folder / "ep2-6" / "rank1.log").read_text(encoding="utf-8")
    names = [MOVED[trained.name].replace("_", " "), *(["relu_l1_loss"] if trained.name == "relu" else [])]
    line = next(line for line in output.splitlines() if "iteration        6/" in line)
    assert all(f" {name}: " in line for name in names)


def test_export_takes_the_file_along(trained: Trained) -> None:
    """Logits equal Megatron's where neither the plug-in nor the library is; what was moved stands as it was."""
    tokens, ours, theirs = (trained.folder / name for name in ("tokens.pt", "megatron.pt", "exported.pt"))
    torch.save(torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0)), tokens)
    ranks.call(
        infer,
        trained.site,
        flags(trained.name, "serial", trained.folder),
        tokens,
        ours,
        ranks=1,
        folder=trained.folder / "infer",
    )
    model = trained.folder / "model"
    words = ["--checkpoint", str(trained.folder / "saved")]
    place = trained.folder / "export"
    ranks.call(export_and_load, trained.site, words, model, tokens, theirs, ranks=1, folder=place)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if trained.name == "pi-top-p":
        moved = trained.resumed[6]["top_p_by_layer"]
        assert [value for value in config["moved_settings"]["top_p_threshold"] if value is not None] == list(
            moved.values()
        )
    # As in tests/hf/test_hf_megatron.py: two implementations of four layers in float32.
    torch.testing.assert_close(torch.load(theirs), torch.load(ours), rtol=1e-4, atol=1e-4)
