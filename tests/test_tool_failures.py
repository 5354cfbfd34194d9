"""Tools that cannot write: one sentence with the path and exit code 1; a fault keeps its traceback."""

import importlib.util
import json
import re
import signal
from pathlib import Path

import pytest

from megatron_dynmoe.errors import one_sentence, os_sentence

TOOLS = Path(__file__).resolve().parent.parent / "tools"
LONG = "x" * 300


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i} of many words {i * 7919}"}) + "\n" for i in range(400)))
    return path


@pytest.mark.parametrize("output", [f"/tmp/{LONG}", "/dev/null/x", "/proc/nonsense/x"])
@pytest.mark.parametrize("tool", ["collect_corpus", "train_tokenizer"])
def test_output_that_cannot_be_written(tool, output, corpus, capsys):
    flags = ["--output", output]
    flags += ["--megabytes", "0.01"] if tool == "collect_corpus" else ["--corpus", str(corpus), "--vocab-size", "300"]
    assert load(tool).main(flags) == 1
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith(f"{tool}: ")]
    assert len(errors) == 1 and output[:9] in errors[0] and not any("Traceback" in line for line in said)


@pytest.mark.parametrize(
    ("module", "argv", "said"),
    [
        ("demo", ["--output", "/proc/nonsense/x"], "demo: /proc/nonsense"),
        ("demo", ["--output", "{folder}/new", "--ranks", "3"], "demo: --ranks is 3, which does not divide"),
        ("launch", ["--", "/nowhere/torchrun", "x.py"], "launch: /nowhere/torchrun: No such file or directory."),
    ],
)
def test_a_module_that_cannot_start_says_so(module, argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers are for a process of its own
    main = importlib.import_module(f"megatron_dynmoe.{module}.__main__").main
    assert main([word.format(folder=tmp_path) for word in argv]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(said)


def test_every_error_of_the_users_is_of_one_class():
    """Of the package: what is raised with a sentence for the user. PlanError, DemoError and the others say whose."""
    package = TOOLS.parent / "megatron_dynmoe"
    named = re.compile(r"^class (\w+Error)\((.*)\):", re.MULTILINE)
    bases = dict(found for path in package.rglob("*.py") for found in named.findall(path.read_text(encoding="utf-8")))
    assert bases.pop("UserError") == "ValueError" and len(bases) >= 8

    def of_the_user(name):
        return name == "UserError" or (name in bases and of_the_user(bases[name]))

    assert [name for name in bases if not of_the_user(name)] == []


def test_an_interrupted_program_says_what_it_left(capsys):
    @one_sentence("program")
    def main(argv):
        raise KeyboardInterrupt(*argv)

    assert [main(["nothing was written."]), main([])] == [130, 130]
    assert capsys.readouterr().err == "program: interrupted; nothing was written.\nprogram: interrupted\n"


def test_a_fault_is_not_the_users():
    assert os_sentence(ConnectionResetError(104, "reset")) is None
    assert os_sentence(BrokenPipeError(32, "pipe")) is None
    assert os_sentence(FileNotFoundError(2, "no", importlib.__file__ + ".missing")) is None
    assert os_sentence(PermissionError(13, "no", "/data/x")) == "/data/x: Permission denied."
    assert os_sentence(OSError(28, "full")) == "No space left on device."
    assert "(400 characters)" in os_sentence(OSError(36, "long", "y" * 400))
    assert "\n" not in os_sentence(OSError(2, "no", "a\nb"))
