"""What an installation contains, and that importing the package is cheap."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

import megatron_dynmoe
from megatron_dynmoe.programs import report

ROOT = Path(__file__).resolve().parent.parent
SETUP_FILES = ["setup.py", "pyproject.toml", "constraints.txt", "Makefile", "tools/setup_venv.sh", ".ci/run"]
SETUP_FILES.append("tests/te/requirements.txt")


def setup_arguments() -> dict:
    """The keywords that setup.py hands to setuptools."""
    found: dict = {}
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    source = source.replace("from setuptools import find_packages, setup", "from setuptools import find_packages")
    exec(
        compile(source, "setup.py", "exec"),
        {"__file__": str(ROOT / "setup.py"), "setup": lambda **kw: found.update(kw)},
    )
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_folder_of_the_package_is_installed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "megatron_dynmoe").rglob("*.py")}
    installed = set(find_packages(str(ROOT), include=["megatron_dynmoe", "megatron_dynmoe.*"]))
    assert {".".join(folder.parts) for folder in folders} == installed, "a folder without __init__.py is left out"


def test_constraints_pin_what_is_required_and_satisfy_it() -> None:
    arguments, pins = setup_arguments(), constraints()
    for line in arguments["install_requires"] + arguments["extras_require"]["dev"]:
        requirement = Requirement(line)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not accept the pinned {pin}"


def test_megatron_core_is_the_version_the_doctor_asks_for() -> None:
    from megatron_dynmoe import doctor

    assert f"megatron-core=={doctor.MEGATRON_CORE}" in setup_arguments()["install_requires"]
    assert constraints()["megatron-core"] == doctor.MEGATRON_CORE


@pytest.mark.parametrize("name", SETUP_FILES)
def test_set_up_names_no_address(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"\w+://|--(extra-)?index-url|--find-links", text)


def entry_points() -> list[list[str]]:
    """Command, module and function of each console script."""
    return [re.split("[=:]", line) for line in setup_arguments()["entry_points"]["console_scripts"]]


@pytest.mark.parametrize(("command", "module", "function"), entry_points())
def test_entry_points_exist(command: str, module: str, function: str) -> None:
    assert callable(getattr(import_module(module), function))


def test_each_program_is_a_command_and_each_tool_and_example_the_same_entry() -> None:
    """`report` stands for its reports; `command` is what the programs share."""
    modules = {module.rpartition(".")[2] for _, module, _ in entry_points() if ".programs." in module}
    modules |= set(report.REPORTS.values())
    programs = {path.stem for path in (ROOT / "megatron_dynmoe" / "programs").glob("*.py")}
    assert programs - {"__init__", "command"} == modules
    tools = {path.stem: path for path in (ROOT / "tools").glob("*.py")}
    assert set(tools) == programs - {"__init__", "command", "report", "pretrain"}
    for name, path in {**tools, "pretrain": ROOT / "examples" / "pretrain_dynmoe.py"}.items():
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.main is import_module(f"megatron_dynmoe.programs.{name}").main


# As pip writes the wheel's; the helper processes of checkpoints start as this one does.
SCRIPT = """
import multiprocessing, sys
from megatron_dynmoe.programs.pretrain import main
from megatron_dynmoe.launch import parent
def tell():
    sys.exit(10 + parent._watched)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=tell)
    child.start()
    child.join()
    print(parent._watched, child.exitcode)
"""


def test_helper_processes_of_a_command_end_with_their_rank(tmp_path: Path) -> None:
    (tmp_path / "dynmoe-pretrain").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "dynmoe-pretrain")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "11"], done.stderr


def test_the_version_is_said_once() -> None:
    assert setup_arguments()["version"] == megatron_dynmoe.__version__
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "megatron_dynmoe").rglob("*.py")]
    said = [path for path in sources if f'"{megatron_dynmoe.__version__}"' in path.read_text(encoding="utf-8")]
    assert said == [ROOT / "megatron_dynmoe" / "__init__.py"]


def test_import_is_cheap_and_names_resolve_lazily() -> None:
    code = (
        "import sys, megatron_dynmoe; heavy = {'torch', 'megatron', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'DynMoEConfig' in dir(megatron_dynmoe); "
        "from megatron_dynmoe import DynMoEConfig; assert DynMoEConfig().rule == 'top-p'; "
        "assert not {'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'DynMoeConfig'.*DynMoEConfig"):
        megatron_dynmoe.DynMoeConfig  # noqa: B018


def run_setup(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup_venv.sh with a PATH that holds the system's tools alone, and no pyenv."""
    minimal = {"PATH": environment.pop("PATH"), "HOME": str(script.parent), "PYENV_ROOT": str(script.parent / "none")}
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, timeout=60, env=minimal | environment
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the set-up script, its inputs, and a PATH folder ``bin`` that has no Python."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup_venv.sh", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "cksum", "cat", "sed", "tail"):
        (tmp_path / "bin" / tool).symlink_to(
            next(f"{d}/{tool}" for d in os.defpath.split(":") if Path(d, tool).exists())
        )
    return tmp_path


def test_set_up_without_python_says_so_in_one_sentence(checkout: Path) -> None:
    done = run_setup(checkout / "tools/setup_venv.sh", PATH=str(checkout / "bin"))
    assert done.returncode != 0
    assert done.stderr.startswith("setup: no CPython 3.12 ")
    assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_set_up_passes_over_a_python312_that_does_not_run(checkout: Path) -> None:
    """A pyenv shim answers to the name python3.12 and fails; the one that runs lies under pyenv's root."""
    shim = checkout / "bin" / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    real = checkout / "pyenv" / "versions" / "3.12.1" / "bin" / "python"
    real.parent.mkdir(parents=True)
    # Stands for a Python 3.12: passes the probe (-c), says its name, and refuses to make an environment.
    real.write_text('#!/bin/sh\n[ "$1" = -m ] && exit 7\necho "Python 3.12.1 from pyenv"\n')
    for program in (shim, real):
        program.chmod(0o755)
    done = run_setup(checkout / "tools/setup_venv.sh", PATH=str(checkout / "bin"), PYENV_ROOT=str(checkout / "pyenv"))
    assert done.returncode == 7
    assert "setup: making .venv with Python 3.12.1 from pyenv" in done.stdout


FAKE_PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$UV" .venv/bin/uv ;;
*"pip config list") printf "%s\\n" "global.extra-index-url='one two'" "install.cert='/certs'" ;;
esac
"""


@pytest.mark.parametrize("uv_works", [True, False])
def test_set_up_installs_with_uv_under_pips_settings_else_with_pip_and_once(checkout: Path, uv_works: bool) -> None:
    python, uv, calls = checkout / "fake-python", checkout / "fake-uv", checkout / "calls"
    python.write_text(FAKE_PYTHON)
    uv.write_text(f'#!/bin/sh\necho "uv $UV_INDEX $SSL_CERT_FILE $@" >>"$CALLS"\nexit {0 if uv_works else 2}\n')
    for tool in ("mkdir", "cp"):
        (checkout / "bin" / tool).symlink_to(f"/bin/{tool}")
    for program in (python, uv):
        program.chmod(0o755)
    environment = {"PYTHON": str(python), "UV": str(uv), "CALLS": str(calls)}

    done = run_setup(checkout / "tools/setup_venv.sh", PATH=str(checkout / "bin"), **environment)

    assert done.returncode == 0, done.stderr
    said = calls.read_text().splitlines()
    wanted = "-c constraints.txt -e .[dev]"
    assert f"uv one two /certs pip install --python .venv/bin/python {wanted}" in said
    assert (f"-m pip install {wanted}" in said) == (not uv_works)
    calls.unlink()
    again = run_setup(checkout / "tools/setup_venv.sh", PATH=str(checkout / "bin"), **environment)
    assert (again.returncode, again.stdout, calls.exists()) == (0, "", False)
    (checkout / "constraints.txt").write_text("changed")
    run_setup(checkout / "tools/setup_venv.sh", PATH=str(checkout / "bin"), **environment)
    assert calls.exists()


@pytest.mark.parametrize("uv_works", [True, False])
def test_set_up_of_transformer_engine_is_a_folder_of_its_own(checkout: Path, uv_works: bool) -> None:
    calls, wanted = checkout / "calls", checkout / "tests/te/requirements.txt"
    wanted.parent.mkdir(parents=True)
    wanted.write_bytes((ROOT / "tests/te/requirements.txt").read_bytes())
    (checkout / ".venv/bin").mkdir(parents=True)
    stamp = "echo dev | cat - setup.py constraints.txt | cksum >.venv/.installed"
    subprocess.run(["bash", "-c", stamp], cwd=checkout, check=True)
    for name, code in (("uv", 0 if uv_works else 2), ("python", 7)):
        program = checkout / ".venv/bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $@" >>"$CALLS"\nmkdir -p .venv/te\nexit {code}\n')
        program.chmod(0o755)
    for tool in ("cmp", "rm", "cp", "mkdir"):
        (checkout / "bin" / tool).symlink_to(str(shutil.which(tool)))

    done = run_setup(checkout / "tools/setup_venv.sh", "te", PATH=str(checkout / "bin"), CALLS=str(calls))

    flags = "pip install -q --target .venv/te --no-deps -r tests/te/requirements.txt"
    said = [line.replace(" --python .venv/bin/python -q", " -q") for line in calls.read_text().splitlines()]
    assert f"uv {flags}" in said and (f"python -m {flags}" in said) == (not uv_works)
    assert (done.returncode == 0) == uv_works
    assert ("with TE=optional its tests are skipped" in done.stderr) == (not uv_works)
    assert (checkout / ".venv/te/.installed").exists() == uv_works


def test_set_up_refuses_a_wrong_python_variable(checkout: Path) -> None:
    done = run_setup(checkout / "tools/setup_venv.sh", PATH=str(checkout / "bin"), PYTHON="/bin/false")
    assert done.returncode != 0
    assert done.stderr.startswith("setup: PYTHON=/bin/false is not a CPython 3.12")
    assert not (checkout / ".venv").exists()
