"""The doctor on machines that this one is not: its three windows on the world (versions, specs, torch) are replaced."""

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest

from megatron_dynmoe import doctor

VERSIONS = {"torch": "2.13.0", "megatron-core": "0.19.2", "megatron_dynmoe": "0.1.0", "tokenizers": "0.23.3"}


def fake_torch(*, gpus: int = 0, gloo: bool = True, nccl: bool = True, grouped_mm: bool = True) -> SimpleNamespace:
    """As much of torch as the doctor looks at."""
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda="13.0"),
        nn=SimpleNamespace(functional=SimpleNamespace(**({"grouped_mm": print} if grouped_mm else {}))),
        cuda=SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            get_device_name=lambda index: "NVIDIA H200",
            nccl=SimpleNamespace(version=lambda: (2, 29, 7)),
        ),
        distributed=SimpleNamespace(
            is_available=lambda: True, is_gloo_available=lambda: gloo, is_nccl_available=lambda: nccl
        ),
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """``machine(versions, modules, torch)`` makes the doctor see a machine with exactly these."""

    def build(versions=VERSIONS, modules=(), torch=None, requires=None):
        monkeypatch.setattr(doctor, "_version", dict(versions).get)
        monkeypatch.setattr(doctor, "_spec", lambda name: ModuleSpec(name, None) if name in modules else None)
        monkeypatch.setattr(doctor, "_import_torch", lambda: torch)
        monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
        monkeypatch.setattr(doctor.metadata, "requires", lambda name: (requires or {}).get(name, []))
        monkeypatch.setattr(doctor, "PYTHON", sys.version_info[:2])

    return build


def rows(diagnosis: doctor.Diagnosis) -> dict[str, doctor.Row]:
    return {row.what: row for row in diagnosis.rows}


def test_cpu_machine_can_train(machine) -> None:
    machine(torch=fake_torch())
    diagnosis = doctor.diagnose()
    assert diagnosis.reason is None
    assert rows(diagnosis)["CUDA"].version is None
    assert rows(diagnosis)["gloo"].version == "in torch"


def test_gpu_machine_shows_devices_and_nccl(machine) -> None:
    machine(torch=fake_torch(gpus=8))
    found = rows(doctor.diagnose())
    assert found["CUDA"].version == "13.0, driver 580.1, 8 x NVIDIA H200"
    assert found["NCCL"].version == "2.29.7"


@pytest.mark.parametrize(
    ("versions", "torch", "sentence"),
    [
        (VERSIONS, None, "torch is missing or does not import; install one of 2.11 to 2.13."),
        (VERSIONS, fake_torch(grouped_mm=False), "torch 2.13.0 has no grouped_mm; install one of 2.11 to 2.13."),
        (VERSIONS, fake_torch(gloo=False), "torch 2.13.0 was built without gloo; install a build that has it."),
        (VERSIONS, fake_torch(gpus=1, nccl=False), "torch 2.13.0 was built without NCCL; install a build that has it."),
        (VERSIONS | {"megatron-core": None}, fake_torch(), "megatron-core is missing; install 0.19.2."),
        (
            VERSIONS | {"megatron-core": "0.18.0"},
            fake_torch(),
            "megatron-core is 0.18.0; this version of megatron_dynmoe needs 0.19.2 exactly.",
        ),
    ],
)
def test_one_sentence_says_why_not(machine, capsys, versions, torch, sentence) -> None:
    machine(versions, torch=torch)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.rstrip().endswith(f"This machine cannot train: {sentence}")


def test_wrong_python_is_named(machine, monkeypatch) -> None:
    machine(torch=fake_torch())
    monkeypatch.setattr(doctor, "PYTHON", (3, 99))
    assert doctor.diagnose().reason.endswith("needs 3.99.")


@pytest.mark.parametrize(
    ("modules", "version", "use"),
    [
        (["apex"], "0.9.10dev (unrelated)", "nothing: not NVIDIA's, another package of that name"),
        (["apex", "amp_C"], "0.9.10dev", "fused Adam and norms"),
        ([], None, "fused Adam and norms"),
    ],
)
def test_nvidias_apex_is_told_from_the_other(machine, modules, version, use) -> None:
    machine(VERSIONS | {"apex": "0.9.10dev"}, modules, fake_torch())
    row = rows(doctor.diagnose())["apex"]
    assert (row.version, row.used_for) == (version, use)


@pytest.mark.parametrize(
    ("te", "modules", "by"),
    [
        ("2.20.2", [], "Transformer Engine's GEMM"),
        ("2.20.2", ["fused_weight_gradient_mlp_cuda"], "apex"),
        (None, [], None),
    ],
)
def test_what_accumulates_weight_gradients_is_named(machine, te, modules, by) -> None:
    machine(VERSIONS | {"transformer-engine": te}, modules, fake_torch(gpus=1))
    assert rows(doctor.diagnose())["fused accumulation"].version == by


@pytest.mark.parametrize(
    ("text", "hybrid", "use"),
    [
        ("from .buffer import Buffer", None, "flex dispatcher, at most 32 experts a token"),
        ("HybridEPBuffer = 1", "1.2", "flex dispatcher, at most 32 experts a token"),
        ("from .buffers.elastic import ElasticBuffer", None, "nothing: megatron-core"),
    ],
)
def test_hybrid_ep_is_a_build_of_deep_ep(machine, monkeypatch, tmp_path, text, hybrid, use) -> None:
    machine(VERSIONS | {"deep-ep": "1.2"}, torch=fake_torch())
    origin = tmp_path / "__init__.py"
    origin.write_text(text)
    found = {"deep_ep": ModuleSpec("deep_ep", None, origin=str(origin))}
    monkeypatch.setattr(doctor, "_spec", found.get)
    table = rows(doctor.diagnose())
    assert (table["DeepEP"].version, table["HybridEP"].version) == ("1.2", hybrid)
    assert table["DeepEP"].used_for.startswith(use)


def test_missing_requirements_are_found_through_those_that_are_there(machine, capsys) -> None:
    requires = {
        "megatron_dynmoe": ["torch>=2.11", "tokenizers", "sentencepiece>=0.2", 'pytest; extra == "dev"'],
        "tokenizers": ["huggingface-hub<3", 'colorama; sys_platform == "win32"'],
        "torch": ["nvidia-cublas"],  # a container's torch has CUDA without CUDA's packages
    }
    machine(torch=fake_torch(), requires=requires)
    assert doctor.main(["--missing"]) == 0
    assert capsys.readouterr().out == "huggingface-hub<3\nsentencepiece>=0.2\n"
    assert doctor.diagnose().reason == "required packages are missing: huggingface-hub<3, sentencepiece>=0.2."


def test_missing_needs_the_package_itself(machine, capsys) -> None:
    machine({})
    assert doctor.main(["--missing"]) == 1
    assert "pip install --no-deps ." in capsys.readouterr().err


def test_an_arrow_marks_the_stand_in_that_is_in_force(machine) -> None:
    machine(torch=fake_torch())
    lines = {line[:12].strip(): line for line in doctor.table(doctor.diagnose()).splitlines()}
    assert "-> the CPU, gloo" in lines["CUDA"]
    assert "->" not in lines["megatron-cor"]


def test_command_line_on_this_machine() -> None:
    """The real thing in its own process: JSON that parses, exit code and verdict agree, megatron is not imported."""
    code = (
        "import sys; from megatron_dynmoe import doctor; code = doctor.main(['--json']); "
        "sys.exit(9 if 'megatron.core' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["can_train"] else 1)
    assert report["can_train"] == (report["reason"] is None)
    assert {row["what"] for row in report["rows"]} >= {"torch", "megatron-core", "apex", "DeepEP", "Transformer Engine"}


def test_what_transformer_engine_imports_is_named(machine) -> None:
    engine = VERSIONS | {"transformer-engine": "2.20.2", "onnx": "1.23.2", "pydantic": "2.14.3"}
    machine(engine, torch=fake_torch(gpus=8))
    diagnosis = doctor.diagnose()
    assert diagnosis.missing == ["ml_dtypes", "onnx_ir", "onnxscript"]
    assert diagnosis.reason == "required packages are missing: ml_dtypes, onnx_ir, onnxscript."
    assert rows(diagnosis)["what it imports"].otherwise == "it does not; missing: onnxscript, onnx_ir, ml_dtypes"
    machine(engine | {"onnxscript": "0.7.2", "onnx_ir": "1.1.0", "ml_dtypes": "0.6.0"}, torch=fake_torch(gpus=8))
    assert doctor.diagnose().reason is None and "what it imports" not in rows(doctor.diagnose())
    machine(VERSIONS, torch=fake_torch(gpus=8))
    assert doctor.missing_requirements() == []
