"""Tools that cannot write: one sentence with the path and exit code 1; a fault keeps its traceback."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_dynmoe.errors import os_sentence

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
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and output[:9] in errors[0] and not any("Traceback" in line for line in said)


def test_a_fault_is_not_the_users():
    assert os_sentence(ConnectionResetError(104, "reset")) is None
    assert os_sentence(BrokenPipeError(32, "pipe")) is None
    assert os_sentence(FileNotFoundError(2, "no", importlib.__file__ + ".missing")) is None
    assert os_sentence(PermissionError(13, "no", "/data/x")) == "/data/x: Permission denied."
    assert os_sentence(OSError(28, "full")) == "No space left on device."
    assert "(400 characters)" in os_sentence(OSError(36, "long", "y" * 400))
    assert "\n" not in os_sentence(OSError(2, "no", "a\nb"))
