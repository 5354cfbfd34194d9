"""Nonsense on the command line: one sentence that names it and exit code 2, or a run; never a traceback."""

import json

import pytest

from megatron_dynmoe.routers import GATES, PRESETS, RULES
from megatron_dynmoe.routers.registry import methods
from tests import flag_cases, ranks
from tests.layouts import flags


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    ranks.call(flag_cases.try_all, flags("serial"), str(folder / "answers"), ranks=1, folder=folder)
    return json.loads((folder / "answers").read_text())


def test_nonsense_is_one_sentence(tried):
    cases, answers = flag_cases.cases(), tried["cases"]
    assert len(cases) == len(answers) >= 200
    wrong = [
        (" ".join(words), expected, code, said)
        for (words, expected), (code, said) in zip(cases, answers, strict=True)
        if not as_expected(expected, code, said)
    ]
    assert not wrong, "\n".join(map(str, wrong))


def as_expected(expected, code, said):
    if expected == "accepted":
        return code == 0
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    return code == 2 and len(sentences) == 1 and expected in sentences[0] and "Traceback" not in said


def test_help(tried):
    code, text = tried["help"]
    assert code == 0
    assert "--moe-top-p" in text and "--tensor-model-parallel-size" in text
    said = "".join(text.split())  # argparse breaks lines at hyphens, too
    for _, name, method in methods():  # each says for itself what it is
        assert method.about and "".join(f"'{name}': {method.about}".split()) in said
    for names in (GATES, RULES, PRESETS):
        assert "{" + ",".join(names) + "}" in text
    assert "100%" in text and "100%%" not in text  # percent signs that megatron escaped stay one


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("unwritable", "/proc/nonsense"),
        ("full", "No space left on device, said when"),
        ("full_metrics", "/dev/full: No"),
    ],
)
def test_what_the_system_says_is_one_sentence(tried, name, part):
    code, said = tried["errors"][name]
    assert code == 2 and part in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(("name", "place"), [("of_torch", "torch/optim"), ("connection", "socket.py")])
def test_what_is_not_known_to_be_the_users_keeps_its_traceback(tried, name, place):
    code, said = tried["errors"][name]
    first, *rest = said.splitlines()
    assert code == 1
    assert first.startswith("error: ") and place in first
    assert rest[0].startswith("Traceback") and len(rest) > 3
