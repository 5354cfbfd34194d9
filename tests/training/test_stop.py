"""Ends that are asked for: SIGTERM outside the training loop, and a launcher that is gone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import ranks
from tests.layouts import flags

EVALUATE = "--eval-interval 2 --eval-iters 100000 --split 50,50,0".split()


def wait_for(run, words: str, rank: int = 0, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not run.logs[rank].exists() or words not in run.output(rank):
        assert time.monotonic() < deadline and run.processes[rank].is_alive(), f"{words} was not said"
        time.sleep(0.1)


def evaluating(argv, slow: str | None = None) -> int:
    """Train; say when evaluation or the building of datasets begins."""
    from megatron_dynmoe.training import datasets, pretrain

    step, config = pretrain.forward_step, datasets.dataset_config

    def told_step(data, model, *args, **kwargs):
        if not model.training:
            print("EVALUATING", flush=True)
        return step(data, model, *args, **kwargs)

    def told_config(args):
        if slow == "datasets":
            print("BUILDING", flush=True)
            time.sleep(600)
        return config(args)

    pretrain.forward_step, datasets.dataset_config = told_step, told_config
    return ranks.pretrain(argv)


@pytest.mark.parametrize("layout", ["ep2", "pp2"])
def test_sigterm_in_a_long_evaluation_saves_and_leaves(tmp_path, layout):
    save = tmp_path / "save"
    argv = flags(layout, *EVALUATE, "--save", str(save), "--save-interval", "1000")
    run = ranks.start(evaluating, argv, ranks=2, folder=tmp_path / "run")
    wait_for(run, "EVALUATING")
    os.kill(run.processes[1].pid, signal.SIGTERM)  # one rank has the signal, all leave
    begun = time.monotonic()
    assert run.wait(timeout=25) == [0, 0], run.output()[-2000:]
    assert time.monotonic() - begun < 20  # torchrun kills after 30
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_sigterm_in_the_evaluation_after_training(tmp_path):
    argv = flags("serial", *EVALUATE[2:-1], "40,30,30", "--eval-interval", "1000", "--train-iters", "2")
    run = ranks.start(evaluating, argv, ranks=1, folder=tmp_path)
    wait_for(run, "EVALUATING")
    run.kill(signal.SIGTERM)
    assert run.wait(timeout=25) == [0], run.output()[-2000:]


def test_sigterm_while_datasets_are_built_ends_at_once(tmp_path):
    run = ranks.start(evaluating, flags("serial"), "datasets", ranks=1, folder=tmp_path)
    wait_for(run, "BUILDING")
    run.kill(signal.SIGTERM)
    begun = time.monotonic()
    assert run.wait(timeout=25) == [-signal.SIGTERM]
    assert time.monotonic() - begun < 5


FAMILY = """
import os, subprocess, sys, threading, time
rank = '''
import os, threading, time
from megatron_dynmoe.launch.parent import end_with_parent
end_with_parent()
helpers = []
def fork():
    child = os.fork()
    if child:
        helpers.append(child)
    else:
        time.sleep(600)
        os._exit(0)
thread = threading.Thread(target=fork)  # a thread that ends must not take its child along
thread.start(); thread.join(); time.sleep(1.5)
os.kill(helpers[0], 0)
print(os.getpid(), *helpers, flush=True)
time.sleep(600)
'''
subprocess.run([sys.executable, "-c", rank], start_new_session=True)
"""


def test_ranks_and_their_helpers_end_with_a_killed_launcher():
    launcher = subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    family = [int(word) for word in launcher.stdout.readline().split()]
    assert len(family) == 2
    launcher.kill()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert f"process {launcher.pid}, is gone" in launcher.stderr.read()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
