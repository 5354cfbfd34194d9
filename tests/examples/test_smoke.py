"""pretrain.sh on other numbers of GPUs, in FP8, and with SMOKE=1: at toy sizes on this machine."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests import ranks
from tests.example_scripts import (  # noqa: F401  (a fixture)
    EXAMPLES,
    MODELS,
    contains,
    dry_run,
    run,
    settings,
    stand_ins,
    value_of,
)
from tests.layouts import read_metrics

DYNAMIC, DYNMOE, MOE_PLUS_PLUS = "dynamic_moe_24l", "dynmoe_24l", "moe_plus_plus_7b"


def validate(commands: list[tuple[int, list[str]]]) -> None:
    """In a rank: Megatron's parser and checks accept each command line on so many GPUs of the Hopper generation."""
    import sys
    from unittest import mock

    import torch
    from megatron.training.arguments import parse_args, validate_args

    from megatron_dynmoe.training.arguments import add_dynmoe_args, dynmoe_from_args, prepare_argv

    hopper = mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for gpus, argv in commands:
        print(gpus, *argv, flush=True)
        os.environ["WORLD_SIZE"] = str(gpus)
        sys.argv[1:] = prepare_argv(argv)
        args = parse_args(add_dynmoe_args)
        with hopper:
            validate_args(args)
        dynmoe_from_args(args)


def layouts_and_precisions(stub) -> list[tuple[int, list[str]]]:
    commands = []
    for gpus, nodes in ((1, 1), (8, 1), (8, 4), (8, 32)):
        for model in (DYNAMIC, DYNMOE, MOE_PLUS_PLUS):
            argv = dry_run("pretrain.sh", stub, model, GPUS=str(gpus), NNODES=str(nodes))
            assert value_of(argv, "--expert-model-parallel-size") == str(gpus)
            commands.append((gpus * nodes, argv))
    recipes = {"1": "blockwise", "delayed": "delayed", "tensorwise": "tensorwise", "blockwise": "blockwise"}
    for given, recipe in recipes.items():
        argv = dry_run("pretrain.sh", stub, DYNAMIC, FP8=given)
        assert value_of(argv, "--fp8-recipe") == recipe and "--moe-router-padding-for-quantization" in argv
        assert value_of(argv, "--fp8-format") == ("e4m3" if recipe == "blockwise" else "hybrid")
        # which Megatron refuses beside a history of scales
        assert ("--first-last-layers-bf16" in argv) == (recipe != "delayed")
        commands.append((8, argv))
    toy = [smoke(stub, model, TRANSFORMER_IMPL=impl) for model in MODELS for impl in ("local", "transformer_engine")]
    return commands + [(2, argv) for argv in toy]


def test_megatron_accepts_every_size_and_precision(stub):
    ranks.call(validate, layouts_and_precisions(stub), ranks=1, folder=stub / "validate")


def test_fp8_is_off_by_itself(stub):
    for off in ({}, {"FP8": "0"}, {"FP8": ""}):
        assert not any(word.startswith(("--fp8", "--moe-fp8")) for word in dry_run("pretrain.sh", stub, DYNAMIC, **off))


def test_fp8_without_transformer_engine(stub):
    for given, recipe in (("1", "rowwise"), ("delayed", "delayed"), ("rowwise", "rowwise")):
        argv = dry_run("pretrain.sh", stub, DYNAMIC, FP8=given, TRANSFORMER_IMPL="local")
        assert value_of(argv, "--moe-fp8-recipe") == recipe and "--fp8-recipe" not in argv


@pytest.mark.parametrize(
    ("given", "flags", "says"),
    [
        ({"FP8": "mxfp8"}, [], "FP8 is mxfp8; accepted: delayed, tensorwise or blockwise, 1 for blockwise, or 0."),
        ({"FP8": "rowwise"}, [], "FP8 is rowwise; accepted: delayed, tensorwise or blockwise"),
        ({"FP8": "2"}, [], "FP8 is 2; accepted: delayed"),
        (
            {"FP8": "no", "TRANSFORMER_IMPL": "local"},
            [],
            "FP8 is no; accepted: delayed, tensorwise, blockwise or rowwise",
        ),
        ({"GPUS": "none"}, [], "GPUS is none; accepted: a whole number of at least 1."),
        ({"NNODES": "0"}, [], "NNODES is 0; accepted: a whole number of at least 1."),
        ({"TRAIN_ITERS": "1e5"}, [], "TRAIN_ITERS is 1e5; accepted: a whole number"),
        ({"SMOKE": "yes"}, [], "SMOKE is yes; accepted: 1 or 0."),
        ({"LAUNCH": "srun"}, [], "LAUNCH is srun, but this is no task of Slurm's"),
        (
            {},
            ["--expert-model-parallel-size", "5"],
            "--expert-model-parallel-size is 5; accepted for 16 experts on 8 GPUs in this layout: 1, 2, 4, 8.",
        ),
        (
            {"GPUS": "2"},
            ["--expert-model-parallel-size=4"],
            "is 4; accepted for 16 experts on 2 GPUs in this layout: 1, 2.",
        ),
        (
            {"GPUS": "2"},
            ["--pipeline-model-parallel-size", "4"],
            "parallelism of 1 x 1 x 4 does not divide; give a multiple",
        ),
        ({}, ["--context-parallel-size", "x"], "--context-parallel-size is x; accepted: a whole number"),
    ],
)
def test_what_cannot_start_is_one_sentence(stub, given, flags, says):
    done = run("pretrain.sh", stub, DYNAMIC, *flags, **(settings(stub) | given))
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.startswith("pretrain.sh: ") and done.stderr.count("\n") == 1
    assert not (stub / "torchrun.args").exists()


def test_nodes_that_would_not_meet_are_refused(stub):
    done = run("pretrain.sh", stub, DYNAMIC, NNODES="4", **settings(stub))
    assert done.returncode == 2 and "--nodes 4" in done.stderr
    assert not (stub / "torchrun.args").exists()


@pytest.fixture
def a_model(stub, tmp_path, monkeypatch):
    """A checkout of links whose models are those of the test: ``a_model(text)`` makes one and returns how to run it."""
    from tests import example_scripts

    examples = tmp_path / "checkout" / "examples"
    (examples / "models").mkdir(parents=True)
    for file in example_scripts.EXAMPLES.glob("*.*"):
        (examples / file.name).symlink_to(file)

    def make(text: str):
        base = (example_scripts.EXAMPLES / "models" / f"{DYNAMIC}.args").read_text()
        (examples / "models" / "mine.args").write_text(f"{base}\n{text}\n")
        monkeypatch.setattr(example_scripts, "EXAMPLES", examples)

    return make


def test_a_models_file_brings_its_layout(stub, a_model):
    a_model(
        "--pipeline-model-parallel-size 2\n--expert-model-parallel-size 16\n--micro-batch-size 3\n--lr 7e-4\n"
        "--recompute-granularity selective\n--recompute-modules moe_act\n--global-batch-size 768"
    )
    argv = dry_run("pretrain.sh", stub, "mine", GPUS="8", NNODES="4")
    wins = {
        "--expert-model-parallel-size": "16",
        "--micro-batch-size": "3",
        "--lr": "7e-4",
        "--global-batch-size": "768",
    }
    assert {flag: value_of(argv, flag) for flag in wins} == wins
    assert contains(argv, ["--recompute-modules", "moe_act"])
    few = run("pretrain.sh", stub, "mine", GPUS="8", DRY_RUN="1", **settings(stub))
    assert "--expert-model-parallel-size 16 does not fit 16 experts on 8 GPUs in this layout; it is 4." in few.stderr
    assert "--expert-model-parallel-size 4" in few.stdout
    mine = dry_run("pretrain.sh", stub, "mine", "--lr", "1e-4", "--micro-batch-size", "1", GPUS="8")
    assert value_of(mine, "--lr") == "1e-4" and value_of(mine, "--micro-batch-size") == "1"


def smoke(stub, model: str, *flags: str, **given: str) -> list[str]:
    return dry_run("pretrain.sh", stub, model, *flags, SMOKE="1", GPUS="2", **given)


def test_smoke_keeps_what_it_does_not_name(stub):
    done = run(
        "pretrain.sh",
        stub,
        DYNAMIC,
        SMOKE="1",
        DRY_RUN="1",
        CUDA_VISIBLE_DEVICES="",
        PYTHON=sys.executable,
        **settings(stub),
    )
    full = dry_run("pretrain.sh", stub, DYNAMIC)
    kept = {word for word in full if word.startswith("--")} & set(done.stdout.split())
    dropped = {word for word in full if word.startswith("--")} - kept
    assert all(f"dropped {flag}: " in done.stderr for flag in dropped), (dropped, done.stderr)
    assert {"--bf16", "--use-distributed-optimizer", "--overlap-param-gather", "--load", "--save"} <= kept
    assert contains(done.stdout.split(), ["--expert-model-parallel-size", "2"])


def test_smoke_drops_parallelism_of_many_gpus_by_name(stub, a_model):
    a_model(
        "--pipeline-model-parallel-size 4\n--tensor-model-parallel-size 2\n--sequence-parallel\n--moe-layer-freq [1]*24"
    )
    given = {"SMOKE": "1", "GPUS": "2", "TRANSFORMER_IMPL": "transformer_engine", "DRY_RUN": "1"}
    done = run("pretrain.sh", stub, "mine", **(settings(stub) | given))
    assert "dropped --pipeline-model-parallel-size 4" in done.stderr
    assert "dropped --tensor-model-parallel-size 2" in done.stderr and "dropped --sequence-parallel" in done.stderr
    argv = shlex.split(done.stdout)
    ones = ("--pipeline-model-parallel-size", "--tensor-model-parallel-size", "--moe-layer-freq")
    assert [value_of(argv, flag) for flag in ones] == ["1"] * 3 and "--sequence-parallel" not in argv


def tiny_data(folder) -> dict[str, str]:
    from examples.smoke_data import main

    main(folder)
    return {"DATA": str(folder / "text"), "TOKENIZER": str(folder / "tokenizer.model")}


def test_models_train_at_toy_size(stub, tmp_path):
    # each family once, for the time that it takes: DynMoE's is below, and the validation above has them all
    once = [model for model in MODELS if model == MOE_PLUS_PLUS or model.startswith("dynamic")]
    data = tiny_data(tmp_path / "data")
    for model in once:
        save = tmp_path / model
        given = data | {"SAVE": str(save), "TRAIN_ITERS": "2", "TRANSFORMER_IMPL": "local"}
        argv = [*smoke(stub, model, **given), "--eval-iters", "0", "--num-workers", "0"]
        ranks.call(ranks.pretrain, argv, ranks=2, folder=save / "ranks")
        assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
        assert read_metrics(save / "metrics.jsonl")[-1]["experts_per_token"] > 0


def test_smoke_as_users_run_it_saves_on_sigterm_and_resumes(stub, tmp_path):
    """Script, supervisor, torchrun and two ranks."""
    save = tmp_path / "save"
    given = {"SMOKE": "1", "SAVE": str(save), "CUDA_VISIBLE_DEVICES": "", "TRAIN_ITERS": "100000"}
    given |= {"PYTHON": sys.executable, "TORCHRUN": str(stub / "torchrun")}
    (stub / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    command = ["bash", str(EXAMPLES / "pretrain.sh"), DYNMOE]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=os.environ | given, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 400  # several starts of torch, on a machine that does other things too
            while not (save / "metrics.jsonl").exists():
                assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.2)
            job.send_signal(signal.SIGTERM)
            assert job.wait(timeout=100) in (0, 143), (tmp_path / "log").read_text()[-3000:]
        finally:
            job.kill()
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert "exiting program after receiving SIGTERM" in (tmp_path / "log").read_text()
    data = {"DATA": str(save / "data" / "text"), "TOKENIZER": str(save / "data" / "tokenizer.model"), "SAVE": str(save)}
    argv = smoke(stub, DYNMOE, TRANSFORMER_IMPL="local", TRAIN_ITERS="100000", **data)
    argv += ["--num-workers", "0", "--exit-interval", str(saved + 1)]  # forked ranks cannot start workers
    ranks.call(ranks.pretrain, argv, ranks=2, folder=tmp_path / "resumed")
    assert read_metrics(save / "metrics.jsonl")[-1]["iteration"] == saved + 1
