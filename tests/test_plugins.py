"""Methods of other packages: named on the command line, or installed; broken ones are said."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dynmoe import ConfigError
from megatron_dynmoe.plugins import load_plugins, named_in

RULE = """
from megatron_dynmoe.routers.registry import register_rule
@register_rule("everyone")
def everyone(scores_TE, config):
    return scores_TE >= 0
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--moe-plugin a b --lr 1", ["a", "b"]),
        ("--moe-plugin=a.b --moe-plugin c", ["a.b", "c"]),
        ("--lr 1 --moe-plugins a", []),
        ("--moe-plugin", []),
    ],
)
def test_named_modules(words: str, found: list[str]) -> None:
    assert named_in(words.split()) == found


def test_a_named_module_that_is_broken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    (tmp_path / "taken_plugin.py").write_text(RULE.replace("everyone", "top-p", 1))
    importlib.invalidate_caches()
    for module, reason in {
        "broken_plugin": "ZeroDivisionError",
        "taken_plugin": "already",
        "no_plugin": "No module",
    }.items():
        with pytest.raises(ConfigError, match=f"--moe-plugin is '{module}', which cannot be imported .*{reason}"):
            load_plugins([module])


def test_installed_ones_are_found_and_a_broken_one_is_said(tmp_path: Path) -> None:
    """In a process of its own: what is registered stays."""
    for name, source in {"good_plugin": RULE, "bad_plugin": "import nothing_of_that_name\n"}.items():
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[megatron_dynmoe.methods]\nmine = {name}\n")
    code = "from megatron_dynmoe.plugins import load_plugins; load_plugins(); load_plugins()\n"
    code += "from megatron_dynmoe import DynMoEConfig; print(DynMoEConfig(rule='everyone').rule)"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "everyone", done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("megatron_dynmoe:")]
    assert len(said) == 1 and "bad_plugin" in said[0] and "nothing_of_that_name" in said[0]
