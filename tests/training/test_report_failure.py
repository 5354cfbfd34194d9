"""A failure on any rank: one sentence with rank and host, no rank waits (``Run.wait`` kills it after 5 s)."""

import os
import signal
import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests import ranks
from tests.layouts import flags


def faulty(argv, place: str, on_ranks: tuple[int, ...], port: int | None) -> int:
    """Train, with a fault at ``place`` on some ranks; ``port`` is of a store such as torchrun's agent keeps."""
    if port is not None:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
    from megatron_dynmoe.config import ConfigError
    from megatron_dynmoe.training import command_line, pretrain

    def fail(*args, **kwargs):
        if int(os.environ["RANK"]) in on_ranks:
            if place == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise (KeyError if place == "training" else ConfigError)(f"fault in {place}")
        return original(*args, **kwargs)

    if place == "check_data":
        original = command_line.parse_and_validate_args
        command_line.parse_and_validate_args = fail
    elif place == "load":
        from megatron.training import training

        original = training.load_checkpoint
        training.load_checkpoint = fail
    elif place == "datasets":
        from megatron_dynmoe.training import datasets

        original = datasets.dataset_config
        datasets.dataset_config = fail
    else:
        original = pretrain.forward_step
        pretrain.forward_step = fail
    return ranks.pretrain(argv)


def errors(run) -> list[str]:
    texts = [run.output(rank) for rank in range(len(run.logs))]
    return [line for text in texts for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture
def agent():
    """The store of torchrun's agent, which is there before the first rank."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


@pytest.mark.parametrize("on_ranks", [(1,), (0,), (0, 1)], ids=str)
def test_before_there_is_a_process_group(tmp_path, agent, on_ranks):
    run = ranks.start(faulty, flags("dp2"), "check_data", on_ranks, agent.port, ranks=2, folder=tmp_path)
    assert run.wait() == [2, 2]
    said = errors(run)
    assert len(said) == 1, said
    assert said[0].endswith(f" on {socket.gethostname()}: fault in check_data")
    assert said[0].split()[2] in map(str, on_ranks)
    assert "Traceback" not in run.output(0) + run.output(1)


@pytest.mark.parametrize(
    ("place", "rank", "code"), [("datasets", 1, 2), ("load", 1, 2), ("training", 1, 1), ("training", 0, 1)]
)
def test_while_the_others_wait_in_a_collective(tmp_path, place, rank, code):
    save = tmp_path / "save"
    argv = flags(
        "dp2", *(["--load", str(save), "--save", str(save), "--save-interval", "9"] if place == "load" else [])
    )
    run = ranks.start(faulty, argv, place, (rank,), None, ranks=2, folder=tmp_path / "run")
    assert run.wait() == [code, code], run.output(0)[-2000:] + run.output(1)[-2000:]
    said = errors(run)
    assert len(said) == 1, said
    assert said[0].startswith(f"error: rank {rank} on {socket.gethostname()}: ") and f"fault in {place}" in said[0]
    # what is not known to be the user's fault shows where it came from
    assert ("Traceback" in run.output(rank)) == (place == "training")
    assert "Traceback" not in run.output(1 - rank)


def test_a_rank_that_was_killed(tmp_path):
    run = ranks.start(faulty, flags("dp2"), "killed", (1,), None, ranks=2, folder=tmp_path)
    assert run.wait() == [1, -signal.SIGKILL]
    said = errors(run)
    assert len(said) == 1 and "a collective lost a rank" in said[0], run.output(0)[-2000:]
    assert "Traceback" not in run.output(0)


def on_a_full_disk(argv) -> int:
    """Train where no file can grow beyond 200 kB; the checkpoint is larger, the log is not."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    return ranks.pretrain(argv)


@pytest.mark.parametrize("layout", ["serial", "dp2"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(tmp_path, layout):
    save = tmp_path / "save"
    argv = flags(layout, "--save", str(save), "--save-interval", "2", "--train-iters", "4")
    run = ranks.start(on_a_full_disk, argv, ranks=1 if layout == "serial" else 2, folder=tmp_path / "run")
    assert set(run.wait()) == {2}, run.output()[-2000:]
    said = errors(run)
    # Which rank finds out with which words is Megatron's; each names the folder.
    assert said and all(f"{save} cannot be loaded or saved" in line or "File too large" in line for line in said), said
    assert not any("Traceback" in run.output(rank) for rank in range(len(run.logs)))
    assert not (save / "latest_checkpointed_iteration.txt").exists()
