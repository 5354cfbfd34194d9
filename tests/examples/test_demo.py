"""The demo's driver on commands of a second; the demo itself is `make demo`."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_dynmoe.demo import __main__ as program
from megatron_dynmoe.demo import runner, steps
from megatron_dynmoe.demo.steps import SAVED_AT, DemoError, Machine, Step
from megatron_dynmoe.demo.summary import sample_of, summarize, table


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def run(tmp_path: Path) -> runner.Runner:
    return runner.Runner(tmp_path, dict(os.environ))


def test_step_runs_once_and_again_when_its_command_changes(run, tmp_path, capsys) -> None:
    counter = tmp_path / "count"
    code = f"open({str(counter)!r}, 'a').write('x'); print('hello')"
    log = run.run(Step("count", "counts", python(code)))
    again = runner.Runner(tmp_path, dict(os.environ))
    again.run(Step("count", "counts", python(code)))
    assert counter.read_text() == "x"
    again.run(Step("count", "counts", python(code + ";")))
    assert counter.read_text() == "xx"
    assert log.read_text() == "hello\n"
    assert "done before, skipped" in capsys.readouterr().out


def test_failed_step_is_one_sentence_with_cause_and_log_and_is_not_remembered(run, tmp_path) -> None:
    step = Step("bad", "fails", python("raise ValueError('p is 2; accepted: [0, 1].')"))
    with pytest.raises(
        DemoError, match=r"^step 'bad' failed with exit code 1 \(ValueError: p is 2; .*\); .*bad\.log\.$"
    ):
        run.run(step)
    assert "bad" not in runner.Runner(tmp_path, {}).done


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", ""),
        ("error: no such file.\n", " (error: no such file)"),
        ("[rank1]: torch.OutOfMemoryError: 3 GB\nE1122 ChildFailedError: \n====\n", " (torch.OutOfMemoryError: 3 GB)"),
    ],
)
def test_cause_is_found_in_the_output(text: str, cause: str) -> None:
    assert runner.last_error(text) == cause


def test_leftovers_are_discarded_before_the_command(run, tmp_path) -> None:
    (tmp_path / "checkpoint").mkdir()
    code = f"import os; assert not os.path.exists({str(tmp_path / 'checkpoint')!r})"
    run.run(Step("fresh", "starts afresh", python(code), discards=(tmp_path / "checkpoint",)))


def test_training_bar_follows_the_metrics_file_and_forgets_an_older_one(run, tmp_path, capsys) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 99, "lm_loss": 0.0, "experts_per_token": 1, "tokens_per_second": 1}\n')
    row = {"iteration": 10, "lm_loss": 7.5, "experts_per_token": 2.25, "tokens_per_second": 1000.0}
    code = f"open({str(metrics)!r}, 'a').write({json.dumps(row)!r} + chr(10) + '{{\"iter'); print('iteration 10')"
    run.run(Step("train", "trains", python(code), metrics, 0, 20))
    said = capsys.readouterr().out
    assert "10/20" in said
    assert "loss 7.500, 2.25 experts/token, 1000 tokens/s" in said
    assert "99/" not in said


def test_termination_ends_the_command_and_says_how_to_go_on(tmp_path) -> None:
    """SIGTERM to the driver while a command runs: the command is gone, the exit code is 130, the sentence is there."""
    mark = tmp_path / "child"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    driver = (
        "import sys; from megatron_dynmoe.demo import __main__ as p; from megatron_dynmoe.demo.steps import Step; "
        f"p.look_at_machine = lambda ranks, preset: p.Machine(1, 0, 1); "
        f"p.data_steps = lambda folder: [Step('wait', 'waits', [sys.executable, '-c', {child!r}])]; "
        f"sys.exit(p.main(['--output', {str(tmp_path / 'demo')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--continue" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_folder_of_something_else_is_refused_and_kept(tmp_path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert program.main(["--output", str(tmp_path)]) == 1
    assert "holds files of something else; name a new or an empty folder." in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_own_folder_is_emptied_unless_continued(tmp_path) -> None:
    folder = tmp_path / "demo"
    program.prepare(folder, go_on=False)
    (folder / "old").touch()
    program.prepare(folder, go_on=True)
    assert (folder / "old").exists()
    program.prepare(folder, go_on=False)
    assert not (folder / "old").exists()


@pytest.mark.parametrize("ranks", [0, -1, 3])
def test_ranks_that_cannot_share_the_experts_are_refused(ranks: int) -> None:
    said = rf"--ranks is {ranks}, which does not divide --num-experts 8; accepted: 1, 2, 4, 8\."
    with pytest.raises(DemoError, match=said):
        steps.look_at_machine(ranks)


def test_ranks_share_the_cores_and_the_user_has_the_last_word(monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert program.environment(Machine(ranks=2, gpus=0, cores=8))["OMP_NUM_THREADS"] == "4"
    assert program.environment(Machine(ranks=2, gpus=0, cores=1))["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert program.environment(Machine(ranks=2, gpus=0, cores=8))["OMP_NUM_THREADS"] == "3"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with the metrics of a training that never was."""

    def row(iteration: int, experts: float) -> dict:
        layers = {"0": experts + 1, "1": experts - 1}
        return {
            "iteration": iteration,
            "lm_loss": 5.0,
            "experts_per_token": experts,
            "experts_per_token_by_layer": layers,
            "tokens_per_second": 1000.0 * experts,
        }

    held_out = [{"iteration": 0, "validation_loss": 8.0}, {"iteration": 2 * SAVED_AT, "validation_loss": 4.5}]
    parts = [[held_out[0]], [row(10, 4.0), row(SAVED_AT, 3.0)], [row(SAVED_AT + 10, 2.5), row(2 * SAVED_AT, 2.0)]]
    parts[2].append(held_out[1])
    for number, rows in enumerate(parts):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        steps.metrics_file(tmp_path, number).write_text(text)
    return tmp_path


def test_summary_has_the_named_keys_and_the_right_rows(trained: Path) -> None:
    summary = summarize(trained, "def f():")
    assert summary == {
        "loss_start": 8.0,
        "loss_end": 4.5,
        "experts_per_token_start": 4.0,
        "experts_per_token_end": 2.0,
        "experts_per_token_by_layer": {"0": 3.0, "1": 1.0},
        "tokens_per_second": 2750.0,
        "resumed_at": SAVED_AT,
        "checkpoint": str(trained / "checkpoint"),
        "export": str(trained / "model"),
        "sample": "def f():",
    }
    assert "8.000 -> 4.500" in table(summary)


def test_sample_begins_at_the_prompt() -> None:
    code, prose = steps.PROMPTS
    said = f"{code}    return 1\n\n---\n{prose} are"
    assert sample_of(f"Loading weights: 100%\n{said}\n") == said
    for missing in ("", code, prose):
        with pytest.raises(DemoError, match="does not repeat the prompt"):
            sample_of(f"Loading weights: 100%\n{missing}\n")


def test_summary_refuses_a_second_half_that_did_not_resume(trained: Path) -> None:
    first = steps.metrics_file(trained, 1).read_text()
    steps.metrics_file(trained, 2).write_text(first + steps.metrics_file(trained, 2).read_text())
    with pytest.raises(DemoError, match=r"began at iteration 10 instead of after \d+, so it did not resume"):
        summarize(trained, "")


def test_summary_refuses_a_training_that_is_not_whole(trained: Path) -> None:
    steps.metrics_file(trained, 2).unlink()
    with pytest.raises(DemoError, match="hold no full training"):
        summarize(trained, "")


def test_commands_are_programs_of_the_package(tmp_path: Path, monkeypatch) -> None:
    """No file of a checkout: the wheel's demo runs the same."""
    monkeypatch.setattr(steps, "blend", lambda folder, split: [])
    machine = Machine(ranks=2, gpus=0, cores=2)
    for step in steps.data_steps(tmp_path) + steps.training_steps(tmp_path, machine) + steps.model_steps(tmp_path):
        modules = [after for word, after in pairwise(step.command) if word == "-m"]
        assert modules[-1].startswith("megatron_dynmoe.programs.") and all(map(find_spec, modules))
        assert not [word for word in step.command if word.endswith(".py")]


def test_commands_weigh_subsets_by_their_tokens(tmp_path: Path) -> None:
    for subset, tokens in zip(steps.SUBSETS, (300, 100), strict=True):
        for split in ("train", "heldout"):
            path = steps.token_prefix(tmp_path, subset, split)
            path.parent.mkdir(exist_ok=True)
            path.with_name(path.name + ".json").write_text(json.dumps({"tokens": tokens}))
    command = steps.training_steps(tmp_path, Machine(ranks=2, gpus=0, cores=2))[1].command
    at = command.index("--train-data-path")
    assert command[at + 1 : at + 5] == ["300", f"{tmp_path}/tokens/code_train", "100", f"{tmp_path}/tokens/docs_train"]
    assert "--bf16" not in command
    gpu = steps.training_steps(tmp_path, Machine(ranks=1, gpus=1, cores=8))[0].command
    assert {"--bf16", "--nproc-per-node=1"} <= set(gpu)
