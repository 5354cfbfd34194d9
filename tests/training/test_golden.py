"""Losses of a short run on two ranks, as they were written down; a change of any of them is a change of behaviour.

python -m tests.training.test_golden    # writes golden_losses.txt anew: look at the difference before you keep it
"""

import re
import sys
import tempfile
from pathlib import Path

import pytest

from tests import ranks
from tests.layouts import LAYOUTS, MODEL

GOLDEN = Path(__file__).with_name("golden_losses.txt")
ITERATIONS = 4
PRESETS = {
    "dynamic-moe": [],
    "dynmoe": "--moe-record-from 1 --moe-update-at 3 --moe-update-period 3 --moe-initial-experts 2".split(),
    "moe-plus-plus": [],
}
NAMES = ("lm loss", "load_balancing_loss", "entropy_loss", "diversity_loss", "simplicity_loss", "z_loss", "grad norm")
NAMES += ("experts per token", "active experts", "zero tokens", "copy tokens", "constant tokens")


def lines(preset: str, folder: Path) -> list[str]:
    """What the last rank says of each iteration: ``preset iteration name value``, a number a line."""
    model = [*MODEL[: MODEL.index("--moe-preset")], "--moe-z-loss-coeff", "1e-3", "--moe-preset", preset]
    words = [*model, *PRESETS[preset], *LAYOUTS["ep2"][1].split(), "--exit-interval", str(ITERATIONS)]
    output = ranks.call(ranks.pretrain, words, ranks=2, folder=folder).output(1)
    found = []
    for iteration, rest in re.findall(r" iteration +(\d+)/ +\d+ \|(.*)", output):
        said = dict(re.findall(r" ([A-Za-z_ ]+): +([-0-9.eE+]+) \|", rest))
        found += [f"{preset} {iteration} {name}: {float(said[name]):.6g}" for name in NAMES if name in said]
    return found


@pytest.fixture(scope="module")
def golden() -> dict[str, float]:
    parts = (line.rsplit(": ", 1) for line in GOLDEN.read_text(encoding="utf-8").splitlines())
    return {name: float(value) for name, value in parts}


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_are_those_written_down(preset, golden, tmp_path):
    got = {name: float(value) for name, value in (line.rsplit(": ", 1) for line in lines(preset, tmp_path))}
    wanted = {name: value for name, value in golden.items() if name.startswith(f"{preset} ")}
    assert sorted(got) == sorted(wanted)
    # Four steps of Adam, on another processor: rounding of 2^-24 in a gradient near 0 moves a weight by the learning
    # rate, 1e-3 of weights of 0.2, in a few of 10^5 weights. Counts change where a score lies at a threshold: 1 of 256
    # tokens. A wrong loss, coefficient or gradient is off by per cents.
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=2e-3, abs=2e-6), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        text = [line for preset in PRESETS for line in lines(preset, Path(place, preset))]
    GOLDEN.write_text("\n".join(text) + "\n", encoding="utf-8")
    sys.exit(0)
