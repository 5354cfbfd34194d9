"""A resume that would be another model, function, vocabulary or optimizer is refused by name."""

import contextlib
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.checkpoint.compare import (
    MODEL,
    SHAPES,
    check_function,
    check_tokenizer,
    check_vocabulary,
    routing_arguments,
)
from megatron_dynmoe.checkpoint.lock import LOCK, hold
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.routers.registry import fields_of, methods
from megatron_dynmoe.routers.router_config import all_fields
from megatron_dynmoe.routers.settings import dest_of_field
from tests import ranks
from tests.layouts import flags, read_metrics


def args(**changes) -> Namespace:
    fields = {"moe_rule": "top-p", "moe_top_p": 0.4, "moe_router_topk": 2, "moe_gate": "softmax", "num_layers": 4}
    fields |= {"moe_layer_freq": 2, "rotary_base": 10000, "hidden_size": 8, "moe_aux_loss_coeff": 0.1}
    return Namespace(**(fields | changes))


# What a resumed run may change: losses, schedules, bounds while training, who computes.
FREE = """
moe_aux_loss_coeff moe_entropy_coeff moe_diversity_coeff moe_simplicity_coeff moe_efficiency_coeff moe_z_loss_coeff
moe_input_jitter_eps moe_max_rows moe_max_rows_per_token moe_tau moe_capacity_gamma moe_initial_experts moe_record_from
moe_update_at moe_update_period moe_max_added_experts moe_added_expert_init moe_expert_backend moe_dispatch_unit
moe_fp8_recipe moe_fp8_format moe_fp8_emulate fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
""".split()


def test_what_a_resumed_run_may_change_is_said_at_the_setting() -> None:
    names = {dest_of_field(field) for field in all_fields(DynMoEConfig)}
    assert sorted(names - set(routing_arguments())) == sorted(FREE)
    assert not names & {*MODEL, *SHAPES}


def readers() -> dict[str, dict[str, str]]:
    """For each setting of a method, arguments that choose one that reads it."""
    return {dest_of_field(f): {f"moe_{kind}": name} for kind, name, method in methods() for f in fields_of(method)}


@pytest.mark.parametrize("name", [*routing_arguments(), *MODEL])
def test_a_change_of_function_is_refused_or_allowed(name: str) -> None:
    reader = readers().get(name, {})
    saved, given = args(**(reader | {name: "old"})), args(**(reader | {name: "new"}))
    with pytest.raises(CheckpointError, match=r"is 'new', saved 'old'.*--moe-allow-routing-change"):
        check_function(saved, given, allow=False)
    assert len(check_function(saved, given, allow=True)) == 1


def test_what_is_the_same_or_not_read_passes() -> None:
    assert check_function(args(), args(moe_layer_freq=[1, 0, 1, 0]), allow=False) == []
    assert check_function(args(), args(moe_router_topk=1), allow=False) == []  # top-p does not read it
    assert check_function(args(), args(moe_aux_loss_coeff=0.2), allow=False) == []
    # accepted beside another gate by earlier versions, which stood in checkpoints then
    assert check_function(args(moe_cosine_scale=2.0), args(moe_cosine_scale=1.0), allow=False) == []
    older = args()
    del older.rotary_base  # from a version without the argument
    assert check_function(older, args(), allow=False) == []


def test_shapes_are_refused_whatever_is_allowed() -> None:
    with pytest.raises(CheckpointError, match="--hidden-size is 16, saved 8"):
        check_function(args(), args(hidden_size=16), allow=True)


def test_the_vocabulary_fits_the_padded_rows() -> None:
    saved = Namespace(padded_vocab_size=256, make_vocab_size_divisible_by=64, tensor_model_parallel_size=2)
    for size in (129, 200, 256):
        check_vocabulary(saved, size)
    for size in (128, 257):
        with pytest.raises(CheckpointError, match=f"has {size} tokens, the checkpoint was trained with 129 to 256"):
            check_vocabulary(saved, size)


def test_another_tokenizer_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("old.json", "moved.json", "other.json")]
    for path, text in zip(files, "aab", strict=True):
        path.write_text(text)
    saved, moved, other = (Namespace(tokenizer_type="A", tokenizer_model=str(path)) for path in files)
    assert check_tokenizer(saved, moved, allow=False) == []
    with pytest.raises(CheckpointError, match=r"--tokenizer-model is .*other.json, whose content is another"):
        check_tokenizer(saved, other, allow=False)
    assert len(check_tokenizer(saved, other, allow=True)) == 1
    with pytest.raises(CheckpointError, match="--tokenizer-type is 'B', saved 'A'"):
        check_tokenizer(saved, Namespace(tokenizer_type="B", tokenizer_model=None), allow=False)
    files[0].unlink()
    assert "cannot be compared" in check_tokenizer(saved, other, allow=False)[0]


REFUSED = {
    "--moe-preset gshard": ("--moe-rule is 'top-k', saved 'top-p'", "--moe-allow-routing-change"),
    "--moe-top-p 0.5": ("--moe-top-p is 0.5, saved 0.4",),
    "--moe-gate tanh": ("--moe-gate is 'tanh', saved 'softmax'",),
    "--moe-zero-experts 1": ("--moe-zero-experts is 1, saved 0",),
    "--moe-expert-input-scale 2": ("--moe-expert-input-scale is 2.0, saved 1.0",),
    "--rotary-base 500": ("--rotary-base is 500, saved 10000",),
    "--norm-epsilon 1e-3": ("--norm-epsilon", "saved 1e-05"),
    "--num-attention-heads 2": ("--num-attention-heads is 2, saved 4", "another model"),
    "--num-layers 5 --moe-layer-freq 1": ("--num-layers is 5, saved 4",),
    "--vocab-size 96": ("has 96 tokens, the checkpoint was trained with",),
    "--optimizer sgd": ("--optimizer is 'sgd', saved 'adam'", "--no-load-optim"),
    "--use-distributed-optimizer": ("--use-distributed-optimizer is True, saved False",),
    "--train-iters 200": ("--train-iters", "lr_decay_steps 1600", "has 800", "--override-opt-param-scheduler"),
    "--lr 1e-2": ("--lr makes max_lr 0.01", "0.001"),
}


def try_all(save: str) -> int:
    """All refused command lines in one process, which megatron's globals are taken back from each time."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    for words in REFUSED:
        print(f"case {words}", flush=True)
        code = ranks.pretrain(flags("serial", "--load", save, *words.split()))
        assert code == 2, words
        destroy_global_vars()
        destroy_num_microbatches_calculator()
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("trained") / "save"
    words = ("--save", str(save), "--save-interval", "1", "--exit-interval", "1")
    ranks.call(ranks.pretrain, flags("serial", *words), ranks=1, folder=save.parent / "log")
    return save


def test_changed_command_lines_are_refused_by_name(tmp_path: Path, trained: Path) -> None:
    run = ranks.call(try_all, str(trained), ranks=1, folder=tmp_path)
    cases = dict(part.split("\n", 1) for part in run.output().split("case ")[1:])
    assert cases.keys() == REFUSED.keys()
    for words, sentences in REFUSED.items():
        said = cases[words]
        assert said.count("error: ") == 1 and "Traceback" not in said
        assert all(sentence in said for sentence in sentences), (words, said)


def test_allowed_changes_and_more_iterations_resume(tmp_path: Path, trained: Path) -> None:
    words = "--moe-top-p 0.5 --moe-allow-routing-change --train-iters 200 --override-opt-param-scheduler".split()
    words += ["--load", str(trained), "--exit-interval", "2", "--moe-metrics-file", str(tmp_path / "metrics.jsonl")]
    run = ranks.call(ranks.pretrain, flags("serial", *words), ranks=1, folder=tmp_path)
    assert "note: --moe-top-p is 0.5, saved 0.4 (--moe-allow-routing-change)." in run.output()
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2]


@contextlib.contextmanager
def owner_of(folder: Path) -> Iterator[int]:
    """A process that holds the lock of a folder, and a child of it that was forked afterwards; its id."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.setsid()
        hold(folder)
        os.fork()
        os.write(write, b"held")
        time.sleep(300)
        os._exit(0)
    try:
        assert os.read(read, 4) == b"held"
        yield pid
    finally:
        os.killpg(pid, signal.SIGKILL)
        os.close(read), os.close(write)


def test_a_lock_names_its_owner_and_dies_with_it(tmp_path: Path) -> None:
    """Also when the owner is killed and a child that it forked lives on."""
    with owner_of(tmp_path) as pid:
        with pytest.raises(CheckpointError, match=rf"is in use by process {pid} on .*, started "):
            hold(tmp_path, wait_s=0.3)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert hold(tmp_path, wait_s=0) is None
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


def test_a_restart_waits_for_the_run_before_it(tmp_path: Path, capsys) -> None:
    with owner_of(tmp_path) as pid:
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        assert hold(tmp_path, wait_s=60) is None
        os.waitpid(pid, 0)
    assert f"is in use by process {pid}" in capsys.readouterr().err


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    from megatron_dynmoe.training import resume

    monkeypatch.setattr(resume, "WAIT_S", 0.2)
    given = {"save": str(tmp_path), "load": None, "pretrained_checkpoint": None, "non_persistent_ckpt_type": None}
    with owner_of(tmp_path) as pid:
        with pytest.raises(CheckpointError, match=f"--save {tmp_path} is in use by process {pid}"):
            resume.prepare(Namespace(**given, fake_process_group=False))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
