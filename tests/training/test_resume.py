"""Interrupted training, resumed, gives the losses of training that was never interrupted: bit for bit on the CPU."""

import signal
import time

import pytest

from tests import ranks
from tests.layouts import flags, read_metrics, read_scalars

END, SAVE_EVERY = 12, 5


def argv(folder, *extra):
    options = f"--exit-interval {END} --save-interval {SAVE_EVERY} --hidden-dropout 0.1 --attention-dropout 0.1".split()
    places = ["--save", str(folder / "save"), "--load", str(folder / "save"), "--tensorboard-dir", str(folder / "tb")]
    return flags("ep2", *options, *places, "--moe-metrics-file", str(folder / "metrics.jsonl"), *extra)


def start(folder, name):
    return ranks.start(ranks.pretrain, argv(folder), ranks=2, folder=folder / name)


def wait_for_iteration(run, folder, iteration):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and read_metrics(path) and read_metrics(path)[-1]["iteration"] >= iteration:
            return
        assert run.processes[0].is_alive(), run.output()[-3000:]
        time.sleep(0.02)
    raise TimeoutError


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    codes = start(folder, "run").wait()
    assert codes == [0, 0]
    return folder


def same_losses(folder, uninterrupted):
    for name in ("lm loss", "grad-norm", "load_balancing_loss", "experts_per_token"):
        expected, got = read_scalars(uninterrupted / "tb", name), read_scalars(folder / "tb", name)
        assert sorted(expected) == list(range(1, END + 1))
        assert got == expected  # equal bits; where an iteration ran twice, the later value stands


def test_sigterm_saves_exits_and_resumes(tmp_path, uninterrupted):
    run = start(tmp_path, "interrupted")
    wait_for_iteration(run, tmp_path, 2)
    run.kill(signal.SIGTERM)
    run.wait()
    saved = int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= saved < END
    assert start(tmp_path, "resumed").wait() == [0, 0]
    same_losses(tmp_path, uninterrupted)


def test_sigkill_between_saves_resumes_from_the_last_save(tmp_path, uninterrupted):
    run = start(tmp_path, "interrupted")
    wait_for_iteration(run, tmp_path, SAVE_EVERY + 2)
    run.kill(signal.SIGKILL)
    assert any(code for code in run.wait())
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() in ("5", "10")
    assert start(tmp_path, "resumed").wait() == [0, 0]
    same_losses(tmp_path, uninterrupted)
