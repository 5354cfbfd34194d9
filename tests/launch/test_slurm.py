"""slurm.sh: where nodes and ranks meet, and when the job queues itself again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.example_scripts import (  # noqa: F401  (a fixture)
    EXAMPLES,
    contains,
    requeued,
    settings,
    slurm,
    slurm_environment,
    stand_ins,
    torchrun_args,
)


def test_slurm_nodes_meet_at_the_first(stub):
    done = slurm(stub, STUB_SAVES="100")
    assert done.returncode == 0, done.stderr
    own, flags = torchrun_args(stub)
    assert contains(own, ["--nnodes", "2"]) and contains(own, ["--rdzv-backend", "c10d"])
    assert contains(own, ["--rdzv-endpoint", "127.0.0.1:23456"]) and contains(own, ["--rdzv-id", "123456-0-1"])
    assert contains(flags, ["--moe-preset", "dynmoe"]) and contains(flags, ["--train-iters", "100"])
    assert "finished: 100 of 100" in done.stdout and not requeued(stub)


def test_slurm_queues_again_after_progress(stub):
    # torchrun ends with 1 when SIGTERM reached it, whatever its ranks saved
    done = slurm(stub, STUB_SAVES="40", STUB_CODE="1")
    assert done.returncode == 0, done.stderr
    assert "saved at iteration 40 of 100" in done.stdout and requeued(stub)


def test_slurm_queues_again_once_without_progress(stub):
    # a node that was lost before the first checkpoint deserves another try, a crash that comes again does not
    done = slurm(stub, STUB_CODE="1")
    assert done.returncode == 0 and requeued(stub)
    assert "no new checkpoint (exit code 1); queueing again, once" in done.stdout
    (stub / "scontrol.calls").unlink()
    done = slurm(stub, STUB_CODE="1")
    assert done.returncode == 2 and not requeued(stub)
    assert "slurm.sh: stopped at iteration 0 of 100 with no new checkpoint (exit code 1) again" in done.stderr


@pytest.mark.parametrize("code", [2, 17])
def test_slurm_stops_at_what_would_come_again(stub, code):
    done = slurm(stub, STUB_SAVES="40", STUB_CODE=str(code))
    assert done.returncode == 2 and not requeued(stub)
    assert f"with exit code {code}, which would come again" in done.stderr


# One rank, in the place of Python: notes what it was given, saves slowly when it is told to leave, fails if it should.
RANK = """#!{python}
import os, pathlib, signal, sys, time
stub, rank = pathlib.Path(os.environ["STUB"]), os.environ["RANK"]
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
def save(*_):
    time.sleep(2)
    if rank == "0":
        saved = pathlib.Path(os.environ["SAVE"], "latest_checkpointed_iteration.txt")
        saved.parent.mkdir(exist_ok=True)
        saved.write_text("40")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
note = f"{{os.getpid()}} " + " ".join(os.environ[name] for name in names) + chr(10) + chr(10).join(sys.argv[1:])
(stub / f"new.{{rank}}").write_text(note)
(stub / f"new.{{rank}}").rename(stub / f"rank.{{rank}}")
if code := os.environ.get("STUB_CODE"):
    if rank == "0":
        outcome = pathlib.Path(os.environ["MEGATRON_DYNMOE_OUTCOME_FILE"])
        outcome.write_text('{{"code": ' + code + ', "sentence": "no"}}')
    sys.exit(int(code) if rank == "0" else 143)  # those that srun kills end higher
if "STUB_SAVES" in os.environ:
    save()
time.sleep(100)
"""


@pytest.fixture
def tasks(stub):
    """The environment in which slurm.sh starts 2 nodes of 4 ranks, each of them ``RANK``."""
    (stub / "python").write_text(RANK.format(python=sys.executable))
    (stub / "python").chmod(0o755)
    return {"LAUNCH": "srun", "PYTHON": str(stub / "python"), "SLURM_GPUS_ON_NODE": "4"}


def test_srun_starts_a_rank_a_gpu(stub, tasks):
    done = slurm(stub, STUB_SAVES="1", **tasks)
    assert done.returncode == 0, done.stderr
    for rank in range(8):
        given, script, *flags = (stub / f"rank.{rank}").read_text().splitlines()
        assert given.split(maxsplit=1)[1] == f"{rank} {rank % 4} 8 4 127.0.0.1 23456"
        assert script == str(EXAMPLES / "pretrain_dynmoe.py")
        assert contains(flags, ["--moe-preset", "dynmoe"]) and contains(flags, ["--expert-model-parallel-size", "8"])
    options = (stub / "srun.options").read_text().split()
    # ranks of one node follow each other, see all its GPUs, and end together
    assert {"--distribution=block", "--gpu-bind=none", "--cpu-bind=none", "--kill-on-bad-exit=1"} <= set(options)
    assert "saved at iteration 40 of 100" in done.stdout and requeued(stub)
    assert not list((stub / "save").glob(".outcome*"))


def test_srun_leaves_ranks_the_time_to_save(stub, tasks):
    job = subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm.sh"), "dynmoe_24l"],
        env=os.environ | slurm_environment(stub) | tasks,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(stub.glob("rank.*"))) < 8:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.1)
        for rank in stub.glob("rank.*"):  # as Slurm does: every task
            os.kill(int(rank.read_text().split()[0]), signal.SIGTERM)
        said = job.communicate(timeout=60)[0]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0 and "saved at iteration 40 of 100; queueing again" in said and requeued(stub)


@pytest.mark.parametrize("code", [2, 17])
def test_srun_stops_at_what_would_come_again(stub, tasks, code):
    done = slurm(stub, STUB_CODE=str(code), **tasks)
    assert done.returncode == 2 and not requeued(stub)
    assert f"with exit code {code}, which would come again" in done.stderr


def test_srun_queues_again_once_after_any_other_failure(stub, tasks):
    assert slurm(stub, STUB_CODE="1", **tasks).returncode == 0 and requeued(stub)
    (stub / "scontrol.calls").unlink()
    assert slurm(stub, STUB_CODE="1", **tasks).returncode == 2 and not requeued(stub)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"LAUNCH": "mpirun"}, "slurm.sh: LAUNCH is mpirun; accepted: torchrun or srun."),
        ({"SLURM_GPUS_ON_NODE": "3"}, "--global-batch-size is 512, which 6 data-parallel replicas"),
    ],
)
def test_launches_that_cannot_work(stub, tasks, given, says):
    done = slurm(stub, **(tasks | given))
    assert done.returncode == 2 and says in done.stderr and not requeued(stub)
