"""A checkpoint of Transformer Engine goes to Hugging Face and back, and trains on with Transformer Engine."""

from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.importing import import_model
from tests.te.runs import command, make_data, train

STEPS = 2


def test_losses_equal_the_originals(tmp_path):
    argv = command("moe_plus_plus_1b", make_data(tmp_path), tmp_path / "save", "--moe-layer-freq", "[0,1]")
    train([*argv, "--save", str(tmp_path / "save"), "--exit-interval", str(STEPS)], tmp_path / "first")
    export(tmp_path / "save", tmp_path / "exported", progress=False)
    import_model(tmp_path / "exported", tmp_path / "imported", progress=False)
    losses = []
    for name, flags in (
        ("original", ["--load", str(tmp_path / "save"), "--finetune", "--no-load-optim"]),
        # The states of FP8, which an import has for some layers and empty, start anew.
        ("imported", ["--load", str(tmp_path / "imported"), "--dist-ckpt-strictness", "log_all"]),
    ):
        places = ["--save", str(tmp_path / name), "--exit-interval", str(STEPS)]
        losses.append(train([*argv, *flags, *places], tmp_path / f"{name}-run")["lm loss"])
    assert losses[0] == losses[1] and sorted(losses[0]) == [1, 2]
