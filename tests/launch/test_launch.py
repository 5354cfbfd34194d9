"""The nodes' supervisors: decisions with the test's own clock, one node for real, and two with a link that is cut."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dynmoe.launch.__main__ import main, parse
from megatron_dynmoe.launch.meeting import Beat, Host

ROOT = Path(__file__).resolve().parents[2]


class Nodes:
    """Several nodes that obey their host at once, and a clock that the test moves."""

    def __init__(self, count: int = 2, **limits) -> None:
        self.now, self.saved, self.told = 0.0, 0, []
        settings = {"lost_after": 90, "give_up_after": 1800, "restarts": 3} | limits
        given = {"saved": lambda: self.saved, "tell": self.told.append, "clock": lambda: self.now}
        self.host = Host(count, **settings, **given)
        self.beats = {}

    def beat(self, *names: str, seconds: float = 0.5, **news) -> list[str]:
        """What each node is told to do, after ``seconds`` in which they all are heard."""
        until, orders = self.now + seconds, []
        while self.now < until:
            self.now += 0.5
            orders = []
            for name in names:
                beat = self.beats.setdefault(name, Beat(name, name))
                for key, value in news.items():
                    setattr(beat, key, value)
                order = self.host.hear(beat)
                beat.running = order.generation if order.what == "run" else 0
                beat.seen = max(beat.seen, order.generation)
                orders.append(f"{order.what} {order.generation}" if order.what == "run" else order.what)
        return orders

    def end(self, name: str, code: int, said: str = "") -> str:
        beat = self.beats[name]
        beat.ended, beat.code, beat.said, beat.running = self.host.generation, code, said, 0
        return self.beat(name)[0]


def test_a_cut_of_thirty_seconds_changes_nothing():
    nodes = Nodes()
    assert nodes.beat("a", seconds=60) == ["wait"]
    assert nodes.beat("a", "b", seconds=1) == ["run 1", "run 1"]
    nodes.beat("a", seconds=30)
    assert nodes.beat("a", "b") == ["run 1", "run 1"]


def test_a_lost_node_that_comes_back_starts_the_next_generation():
    nodes = Nodes()
    nodes.beat("a", "b", seconds=1)
    assert nodes.beat("a", seconds=91) == ["wait"]
    assert "node b has not been heard of for 90 s" in nodes.told[-1]
    assert nodes.beat("a", "b") == ["wait", "wait"]  # it still ran the old generation when it was told to wait
    assert nodes.beat("a", "b", seconds=1) == ["run 2", "run 2"]


def test_a_spare_takes_its_place():
    nodes = Nodes()
    nodes.beat("a", "b", seconds=1)
    assert nodes.beat("a", "b", "spare", seconds=10)[2] == "wait"
    assert nodes.beat("a", "spare", seconds=100) == ["run 2", "run 2"]


def test_nobody_comes():
    nodes = Nodes()
    nodes.beat("a", "b", seconds=1)
    assert nodes.beat("a", seconds=91 + 1801) == ["end"]
    assert "gave up: 1 of 2 nodes are there" in nodes.host.final.said and nodes.host.final.code == 1


def test_a_failure_starts_all_again_until_nothing_new_is_saved():
    nodes = Nodes(restarts=2)
    generations = []
    for saved in (0, 5, 5, 5):
        nodes.saved = saved
        generations.append(nodes.beat("a", "b", seconds=2)[0])
        order = nodes.end("b", 1, "rank 3 on b: killed")
    assert generations == ["run 1", "run 2", "run 3", "run 4"] and order == "end"
    assert nodes.host.final.said == "2 restarts without a new checkpoint; the last: rank 3 on b: killed"


@pytest.mark.parametrize("code", [2, 17])
def test_what_a_restart_would_repeat_is_not_restarted(code):
    nodes = Nodes()
    nodes.beat("a", "b", seconds=1)
    assert nodes.end("b", code, "rank 3 on b: no such file") == "end"
    assert (nodes.host.final.code, nodes.host.final.said) == (code, "rank 3 on b: no such file")


def test_the_end_is_that_of_all_nodes():
    nodes = Nodes()
    nodes.beat("a", "b", seconds=1)
    assert nodes.end("b", 0) == "run 1"
    assert nodes.end("a", 0) == "end" and nodes.host.final.code == 0


def test_a_new_host_goes_on_counting():
    nodes = Nodes()
    nodes.beats["b"] = Beat("b", "b", running=7, seen=7)
    assert nodes.beat("a", "b") == ["wait", "wait"]  # b has to end what it runs
    assert nodes.beat("a", "b", seconds=1) == ["run 8", "run 8"]


def test_settings_that_cannot_work(capsys):
    for words in (["--nodes", "2", "torchrun"], ["--nodes", "2", "--endpoint", "node0", "torchrun"], []):
        with pytest.raises(SystemExit) as ended:
            parse(words)
        assert ended.value.code == 2
    assert "accepted: host:port" in capsys.readouterr().err


def script(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o755)
    return str(path)


def test_one_node_is_restarted_while_it_gets_further(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("megatron_dynmoe.launch.__main__.PAUSE", 0.05)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    body = f"n=$(cat {tracker} 2>/dev/null || echo 0); echo $((n < 3 ? n + 1 : n)) >{tracker}; [ $n -lt 5 ] || exit 0\n"
    command = [script(tmp_path, "torchrun", body + "exit 1"), "train"]
    assert main(["--save", str(tmp_path), "--restarts", "2", "--", *command]) == 1
    said = capfd.readouterr().err
    assert "starting again from iteration 3" in said and "2 restarts without a new checkpoint" in said


def supervise(folder: Path, *command: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "megatron_dynmoe.launch", "--", *command]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


# torchrun's place: it has one child, the rank, and ends with its exit code.
RANK = """python3 -c '
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), pathlib.Path("{folder}/saved").touch(), sys.exit(0)))
pathlib.Path("{folder}/pid").write_text(str(__import__("os").getpid()))
time.sleep(100)'
"""


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


# torchrun waits five minutes for other nodes' ranks, which may have been ended otherwise
@pytest.mark.parametrize(("then", "code"), [("exit $?", 0), ("exec python3 -c 'import time; time.sleep(100)'", 143)])
def test_sigterm_reaches_the_ranks_and_the_supervisor_waits_for_their_save(tmp_path, then, code):
    node = supervise(tmp_path, script(tmp_path, "torchrun", RANK.format(folder=tmp_path) + then))
    wait_for(tmp_path / "pid")
    node.terminate()
    assert node.wait(timeout=30) == code, node.stderr.read()
    assert (tmp_path / "saved").exists()


# A rank whose checkpoint takes longer than torchrun's patience.
SAVE_LONG = """
import pathlib, signal, sys, time
from megatron_dynmoe.launch.parent import end_with_parent
end_with_parent()
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(4), (folder / "saved").touch(), sys.exit(0)))
(folder / "pid").write_text(str(__import__("os").getpid()))
time.sleep(100)
"""


def test_sigterm_to_every_process_leaves_ranks_the_time_to_save(tmp_path, monkeypatch):
    # torchrun would kill after this many seconds; torch 2.11 does not read the variable and kills after 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    (tmp_path / "rank.py").write_text(SAVE_LONG)
    program = script(tmp_path, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    node = supervise(tmp_path, program, "--nproc-per-node", "1", str(tmp_path / "rank.py"), str(tmp_path))
    rank = int(wait_for(tmp_path / "pid"))
    torchrun = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (torchrun, rank, node.pid):  # as Slurm does
        os.kill(pid, signal.SIGTERM)
    # 143: on a busy machine torchrun needs longer to leave after its ranks than the supervisor waits
    assert node.wait(timeout=60) in (0, 143), node.stderr.read()
    assert (tmp_path / "saved").exists()


def test_torchrun_ends_with_a_killed_supervisor(tmp_path):
    body = f"echo $$ >{tmp_path}/torchrun.pid\nsleep 100\n"
    node = supervise(tmp_path, script(tmp_path, "torchrun", body))
    torchrun = Path("/proc", wait_for(tmp_path / "torchrun.pid").strip(), "stat")
    node.kill()
    deadline = time.monotonic() + 10
    while torchrun.exists() and torchrun.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Counts with its peers, and from the saved number on after a restart.
TRAIN = """
import sys, time
from pathlib import Path
import torch
from megatron_dynmoe.launch.parent import end_with_parent
end_with_parent()
tracker, end = Path(sys.argv[1], "latest_checkpointed_iteration.txt"), Path(sys.argv[1], "end")
torch.distributed.init_process_group("gloo")
iteration = int(tracker.read_text()) if tracker.exists() else 0
while True:
    state = torch.tensor([float(end.exists())])
    torch.distributed.all_reduce(state)
    if state > 0:
        time.sleep(1)  # a rank that leaves at once may cut off the sum on its way to the other
        break
    iteration += 1
    if torch.distributed.get_rank() == 0:
        tracker.with_suffix(".new").write_text(str(iteration))
        tracker.with_suffix(".new").rename(tracker)
    time.sleep(0.05)
"""


class Network:
    """Two network namespaces with one link between them."""

    def __init__(self) -> None:
        word = f"dm{os.getpid()}"
        self.spaces = [f"{word}a", f"{word}b"]
        self.links = [f"{word}v", f"{word}w"]

    def __enter__(self):
        for space in self.spaces:
            self.ip("netns", "add", space)
            self.ip("-n", space, "link", "set", "lo", "up")
        a, b = self.spaces
        self.ip("link", "add", self.links[0], "netns", a, "type", "veth", "peer", "name", self.links[1], "netns", b)
        for number, (space, link) in enumerate(zip(self.spaces, self.links, strict=True), start=1):
            self.ip("-n", space, "addr", "add", f"10.213.77.{number}/24", "dev", link)
            self.ip("-n", space, "link", "set", link, "up")
        return self

    def __exit__(self, *error) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def link(self, state: str) -> None:
        self.ip("-n", self.spaces[1], "link", "set", self.links[1], state)


def may_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"dm{os.getpid()}p"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", probe], capture_output=True).returncode == 0


def start_node(network: Network, number: int, folder: Path, log: Path) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    options = ["--nodes", "2", "--endpoint", "10.213.77.1:29613", "--id", "test", "--save", str(folder)]
    limits = ["--lost-after", "6", "--give-up-after", "200"]
    program = script(folder, "torchrun", f'exec {" ".join(torchrun)} "$@"')
    address = ["--nproc-per-node", "1", "--local-addr", f"10.213.77.{number + 1}"]
    command = [sys.executable, "-m", "megatron_dynmoe.launch", *options, *limits, "--", program, *address]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": network.links[number], "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        ["ip", "netns", "exec", network.spaces[number], *command, str(folder / "train.py"), str(folder)],
        env=environment,
        stderr=log.open("a"),
        stdout=log.open("a"),
    )


@pytest.mark.skipif(not may_make_namespaces(), reason="needs root and iproute2")
def test_a_cut_link_and_a_lost_host(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    tracker = tmp_path / "latest_checkpointed_iteration.txt"

    def saved() -> int:
        return int(tracker.read_text()) if tracker.exists() else 0

    def until(true, seconds: float = 200) -> float:  # two starts of torch on a busy machine
        begun = time.monotonic()
        while not true():
            assert time.monotonic() - begun < seconds, "\n".join(log.read_text()[-3000:] for log in logs)
            time.sleep(0.1)
        return time.monotonic() - begun

    with Network() as network:
        nodes = [start_node(network, number, tmp_path, logs[number]) for number in range(2)]
        try:
            until(lambda: saved() >= 5)
            network.link("down")
            until(lambda: "has not been heard of for 6 s" in logs[0].read_text(), 40)
            until(lambda: "10.213.77.1:29613 has not been heard of" in logs[1].read_text(), 40)
            at = saved()
            network.link("up")
            back = until(lambda: saved() > at)

            nodes[0].kill()  # the host, with what keeps the store
            until(lambda: logs[1].read_text().count("10.213.77.1:29613 has not been heard of") == 2, 40)
            at = saved()
            nodes[0].wait()
            nodes[0] = start_node(network, 0, tmp_path, logs[0])
            host_back = until(lambda: saved() > at)
            print(f"link back to next iteration: {back:.1f} s; host back: {host_back:.1f} s")
            (tmp_path / "end").touch()
            assert [node.wait(timeout=100) for node in nodes] == [0, 0]
        finally:
            for node in nodes:
                node.kill()
