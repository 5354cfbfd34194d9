"""Every flag of Megatron's parser stands in docs/flags.md once, and where the page says it is read, it is read."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import flag_cases, ranks
from tests.layouts import flags

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
# Files that name flags only to define, check or refuse them.
DEFINITIONS = ("training/arguments.py", "training/yaml_arguments.py", "core/transformer/transformer_config.py")
OTHER_RUNS = ("core/inference/", "core/export/", "training/config/inference_config.py")
OUR_CHECKS = ("values.py", "refused.py", "paths.py")


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """Megatron's flags by name, and what the entry says to those that it refuses."""
    folder = tmp_path_factory.mktemp("flags")
    refused = re.findall(r"^\| `(--[^`]+)`", PAGE, flags=re.M)
    ranks.call(flag_cases.describe, flags("serial"), refused, str(folder), ranks=1, folder=folder)
    return json.loads((folder / "flags.json").read_text())


@pytest.fixture(scope="module")
def listed(megatron):
    """(heading, name of a flag) of each flag on the page; an option that is unknown stands for itself."""
    names = {option: name for name, options in megatron["flags"].items() for option in options}
    found = []
    for section in re.split(r"^##+ ", PAGE, flags=re.M)[1:]:
        heading, text = section.split("\n", 1)
        options = re.findall(r"^\| `(--[^`]+)`", text, flags=re.M) if heading == "Refused" else []
        if heading not in ("Honoured", "Refused"):
            options = re.findall(r"`(--[^`]+)`", text)
        found += [(heading.replace("`", ""), names.get(option, option)) for option in options]
    return found


def test_each_flag_is_in_one_list(megatron, listed):
    names = [name for _, name in listed]
    assert sorted(set(megatron["flags"]) - set(names)) == [], "a flag that the page does not know: who reads it?"
    assert sorted(set(names) - set(megatron["flags"])) == [], "a flag that Megatron no longer has"
    assert sorted(name for name in names if names.count(name) > 1) == []


def test_refused_flags_are_refused(megatron, listed):
    page = {name for heading, name in listed if heading == "Refused"}
    assert sorted(set(megatron["reasons"]) - page) == []
    for name, (code, said) in megatron["refused"].items():
        assert code == 2 and said.count("\n") == 1, (name, said)
        assert megatron["reasons"].get(name, "") in said
        assert megatron["reasons"].get(name, "") in PAGE


def test_what_megatrons_mapping_leaves_out_reaches_the_model(megatron):
    assert megatron["told"] == {"rope_scaling_factor": 4.0}


def attributes(*folders: str, without: tuple[str, ...] = ()) -> set[str]:
    """Words that are read as attributes, or named in a string, in megatron's sources under ``folders``."""
    (root,) = find_spec("megatron").submodule_search_locations
    return words(Path(root), folders, without)


def words(root: Path, folders: tuple[str, ...], without: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for folder in folders:
        for path in [root / folder] if folder.endswith(".py") else (root / folder).rglob("*.py"):
            if not path.relative_to(root).as_posix().startswith(without):
                text = path.read_text(encoding="utf-8")
                found |= set(re.findall(r"\.(\w+)\b(?! = )", text)) | set(re.findall(r"['\"\s](\w+)(?=['\"\s])", text))
    return found


def test_what_is_honoured_is_read(listed):
    core_configs = {name for path in ("core/transformer", "core/optimizer") for name in fields(path)}
    readers = {
        "By Megatron's check of flags": attributes("training/arguments.py"),
        "By Megatron's training": attributes("training", without=(*DEFINITIONS, *OTHER_RUNS)),
        "By megatron-core": attributes("core", without=(*DEFINITIONS, *OTHER_RUNS)) | core_configs,
        "By this package": words(
            ROOT, ("megatron_dynmoe",), tuple(f"megatron_dynmoe/training/{f}" for f in OUR_CHECKS)
        ),
    }
    unread = [(head, name) for head, name in listed if name not in readers.get(head, {name})]
    assert unread == [], unread


def fields(folder: str) -> set[str]:
    """Fields of the configuration classes in a folder of megatron's."""
    (root,) = find_spec("megatron").submodule_search_locations
    texts = (path.read_text(encoding="utf-8") for path in (Path(root) / folder).glob("*config.py"))
    return {name for text in texts for name in re.findall(r"^    (\w+): ", text, flags=re.M)}


def test_what_has_no_effect_is_read_by_nothing_on_the_way(listed):
    nowhere = attributes("training", "core", without=(*DEFINITIONS, "training/config/"))
    hybrid = "training/argument_utils.py"  # checks the flag of a model that is not GPT
    training = attributes("training", without=(*DEFINITIONS, *OTHER_RUNS, hybrid))
    wrong = [
        (heading, name)
        for heading, name in listed
        if (heading == "Nothing any more" and name in nowhere) or (heading == "Generation" and name in training)
    ]
    assert wrong == []
