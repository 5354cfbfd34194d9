"""Training goes on from an imported folder as from the checkpoint that it was exported from, in every layout.

Losses are equal in bits where the layout is the same: weights come back in bits, and everything else starts anew on
both sides.
"""

from pathlib import Path

import pytest

from megatron_dynmoe.checkpoint.index import read_index
from megatron_dynmoe.checkpoint.reader import DistCheckpoint
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.importing import Imported, import_model
from tests import ranks
from tests.layouts import LAYOUTS, read_metrics

STEPS = 2
TRAINING = """
    --seq-length 32 --vocab-size 128 --moe-token-dispatcher-type alltoall --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 2 --global-batch-size 4 --train-iters 100 --lr 1e-3 --clip-grad 1.0 --eval-iters 0
    --eval-interval 1000 --log-interval 1 --num-workers 0 --tokenizer-type NullTokenizer --ckpt-format torch_dist
    --mock-data --split 100,0,0
""".split()
MODEL = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 8
    --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --init-method-std 0.2 --make-vocab-size-divisible-by 8 --num-experts 4 --moe-ffn-hidden-size 48
""".split()
# What each model has of its own. The first has dense layers and so a key for each layer, the others stacked ones.
MODELS = {
    "dynamic-moe": "--moe-preset dynamic-moe --moe-layer-freq [1,0,1,1] --group-query-attention --num-query-groups 2 "
    "--moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate --untie-embeddings-and-output-weights",
    "dynmoe": "--moe-preset dynmoe --moe-initial-experts 3 --moe-residual --moe-train-cosine-scale "
    "--moe-max-added-experts 2 --moe-shared-expert-intermediate-size 16",
    "moe-plus-plus-released": "--moe-preset moe-plus-plus-released --untie-embeddings-and-output-weights",
}
# Losses and their weights, which are of the training and not of the model: as the preset has them.
OF_TRAINING = {
    "dynamic-moe": "--moe-aux-loss-coeff 1e-2 --moe-entropy-coeff 1e-4",
    "dynmoe": "--moe-diversity-coeff 1e-2 --moe-simplicity-coeff 1e-2",
    "moe-plus-plus-released": "",
}


class Runs:
    """Runs that are started together; each gives its losses and experts per token."""

    def __init__(self, folder: Path):
        self.folder, self._runs = folder, {}

    def start(self, name: str, layout: str, *words: str, steps: int = STEPS) -> None:
        """Train to iteration ``steps`` in ``layout``."""
        count, flags = LAYOUTS[layout]
        places = ["--exit-interval", str(steps), "--moe-metrics-file", str(self.folder / f"{name}.jsonl")]
        argv = [*TRAINING, *flags.split(), *words, *places]
        self._runs[name] = ranks.start(ranks.pretrain, argv, ranks=count, folder=self.folder / name)

    def losses(self) -> dict[str, dict[int, tuple]]:
        """Wait for all of them."""
        found = {}
        for name, run in self._runs.items():
            codes = run.wait()
            assert not any(codes), f"{name}: {codes}\n{run.output()[-3000:]}"
            records = read_metrics(self.folder / f"{name}.jsonl")
            found[name] = {one["iteration"]: (one["lm_loss"], one["experts_per_token"]) for one in records}
        self._runs = {}
        return found


def saved_and_imported(folder: Path, preset: str) -> tuple[list[str], Imported]:
    """A model that was trained for two steps, and its flags; the import of its export."""
    words = [*MODEL, *MODELS[preset].split()]
    runs = Runs(folder)
    runs.start("save", "serial", *words, "--save", str(folder / "save"), "--save-interval", str(STEPS))
    runs.losses()
    export(folder / "save", folder / "exported", progress=False)
    added = 2 if preset == "dynmoe" else 1
    done = import_model(
        folder / "exported", folder / "imported", divisible_by=8, max_added_experts=added, progress=False
    )
    return words, done


def original(folder: Path, words: list[str]) -> list[str]:
    """The flags that go on from the weights of what was trained."""
    return [*words, "--load", str(folder / "save"), "--finetune", "--no-load-optim"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Imported]:
    folder = tmp_path_factory.mktemp("mixed")
    return folder, *saved_and_imported(folder, "dynamic-moe")


def test_losses_equal_the_originals_on_one_rank_and_under_ep_tp_and_pp(mixed) -> None:
    folder, words, done = mixed
    runs = Runs(folder)
    # The flags that the import names are the model's: nothing of MODEL is given again.
    imported = [*done.flags, *OF_TRAINING["dynamic-moe"].split()]
    for layout in ("serial", "ep2"):
        runs.start(f"original-{layout}", layout, *original(folder, words))
        runs.start(f"imported-{layout}", layout, *imported, "--load", str(done.path))
    found = runs.losses()
    for layout in ("tp2-sp", "pp2"):
        runs.start(f"imported-{layout}", layout, *imported, "--load", str(done.path))
    found |= runs.losses()
    assert sorted(found["original-serial"]) == [1, 2]
    for layout in ("serial", "ep2"):
        assert found[f"imported-{layout}"] == found[f"original-{layout}"]
    for layout in ("tp2-sp", "pp2"):
        for step, numbers in found["original-serial"].items():
            # Float32 sums in another order, as in the tests of layouts.
            assert found[f"imported-{layout}"][step] == pytest.approx(numbers, rel=1e-4)


def test_the_command_that_the_tool_names_begins_and_goes_on(mixed) -> None:
    folder, _, done = mixed
    words = [*done.flags, *OF_TRAINING["dynamic-moe"].split(), "--pretrained-checkpoint", str(done.path)]
    words += ["--load", str(folder / "run"), "--save", str(folder / "run"), "--save-interval", "1"]
    for steps in (1, 2):
        runs = Runs(folder)
        runs.start(f"begins-{steps}", "ep2", *words, steps=steps)
        assert list(runs.losses()[f"begins-{steps}"]) == [steps]
    assert (folder / "run/latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.parametrize("preset", ["dynmoe", "moe-plus-plus-released"])
def test_losses_equal_the_originals_with_slots_and_with_carried_logits(tmp_path: Path, preset: str) -> None:
    words, done = saved_and_imported(tmp_path, preset)
    runs, layout = Runs(tmp_path), "ep2" if preset == "dynmoe" else "pp2"
    runs.start("original", layout, *original(tmp_path, words))
    runs.start("imported", layout, *done.flags, *OF_TRAINING[preset].split(), "--load", str(done.path))
    found = runs.losses()
    assert found["imported"] == found["original"] and sorted(found["original"]) == [1, 2]
    same_keys(tmp_path / "save", done.path)


def test_keys_shapes_and_dtypes_are_megatrons(mixed) -> None:
    folder, _, done = mixed
    same_keys(folder / "save", done.path)


def same_keys(save: Path, imported: Path) -> None:
    """All that megatron writes of a model, and nothing else."""
    ours, theirs = DistCheckpoint(imported), DistCheckpoint(save)
    of_training = ("optimizer.", "rng_state", "rerun_state")
    entries = [read_index(checkpoint.path).state_dict_metadata for checkpoint in (ours, theirs)]
    assert set(entries[0]) == {key for key in entries[1] if not key.startswith(of_training)}
    for key, shape in ours.shapes.items():
        assert (shape, ours.dtype(key)) == (theirs.shapes[key], theirs.dtype(key)), key
