"""The layer benchmark: all methods compute the same, maps are what they claim, and a run writes what it should."""

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import bench_moe_layer, measure, report
from benchmarks.competitors import FLOOR, METHODS, PRODUCTS
from benchmarks.competitors.case import Setting, ragged_map
from tests import ranks

ROOT = Path(__file__).resolve().parents[2]
FIELDS = "method mean_k histogram ep tokens seconds floor_seconds rows_sent bytes_sent peak_bytes".split()


def setting(**changes) -> Setting:
    shape = {"tokens": 24, "width": 16, "expert_width": 24, "experts": 4, "dtype": torch.float32}
    return Setting(**shape | {"mean_k": 2, "histogram": "balanced", "ep": 1} | changes)


def check_methods_agree() -> None:
    import torch.distributed as dist

    from benchmarks.competitors import build
    from benchmarks.competitors.case import Case
    from benchmarks.competitors.method import NotPossible

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([r]) for r in range(size)][rank]
    for histogram, k in product(("balanced", "skewed"), (1, 2, 2.5, 4)):
        case = Case.make(setting(histogram=histogram, mean_k=k, ep=size), rank, "cpu", dist.group.WORLD, alone)
        results = {}
        for name in METHODS:
            try:
                method = build(name, case)
            except NotPossible:
                assert name.startswith("megatron") and k == 2.5
                continue
            out = method.step()
            if name == PRODUCTS:
                assert sum(chunk.end - chunk.begin for chunk in method.plan) == method.rows
                continue
            if name == FLOOR:
                assert [p.grad.shape for p in method.parameters] == [case.fc1_LGD.shape, case.fc2_LDF.shape]
                continue
            results[name] = [out, method.x_TD.grad, method.weights_TE.grad, *method.expert_grads()]
        assert len(results) == len(METHODS) - (4 if k == 2.5 else 2)
        first = results.pop("dynmoe-expert")
        assert all(tensor.abs().max() > 0 for tensor in first)
        for name, tensors in results.items():
            for tensor, expected in zip(tensors, first, strict=True):
                # float32 sums of at most 48 products (rows of both ranks), three in a row, in another order
                allowed = 64 * torch.finfo(torch.float32).eps * (1 + expected.abs().max())
                assert (tensor - expected).abs().max() <= allowed, (name, histogram, k, size)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
def test_all_methods_give_the_same_output_and_gradients(size, tmp_path):
    ranks.call(check_methods_agree, ranks=size, folder=tmp_path)


@pytest.mark.parametrize("mean_k", [1, 1.5, 3, 4])
def test_maps_have_exactly_the_wanted_rows(mean_k):
    for histogram in ("balanced", "skewed"):
        wanted = setting(tokens=200, mean_k=mean_k, histogram=histogram)
        map_TE = ragged_map(wanted, torch.Generator().manual_seed(1))
        assert map_TE.sum() == wanted.rows == 200 * mean_k
        assert map_TE.any(dim=1).all()
    if 1 < mean_k < 4:
        assert len(map_TE.sum(dim=1).unique()) > 1, "tokens should differ in how many experts they visit"
        rows_E = map_TE.sum(dim=0)
        assert rows_E[0] > 1.3 * rows_E[3], "skewed: the first expert should be the busiest"


def test_a_run_writes_rows_table_and_picture(tmp_path):
    files = {"json": tmp_path / "rows.json", "markdown": tmp_path / "table.md", "plot": tmp_path / "time.png"}
    tiny = "--tokens 32 --width 16 --expert-width 16 --experts 4 --mean-k 1,2 --repeats 1 --histogram balanced".split()
    flags = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    program = [sys.executable, str(ROOT / "benchmarks" / "bench_moe_layer.py"), "--quick", "--cpu", *tiny, *flags]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(files["json"].read_text())
    assert {tuple(row) for row in rows} == {tuple(FIELDS)}
    assert [(r["ep"], r["mean_k"], r["method"]) for r in rows] == list(product((1, 2), (1, 2), METHODS))
    by_key = {(r["ep"], r["mean_k"], r["method"]): r for r in rows}
    for (ep, k, method), row in by_key.items():
        assert row["seconds"] > 0 and row["peak_bytes"] > 0
        assert row["floor_seconds"] == by_key[ep, k, FLOOR]["seconds"]
        assert (row["bytes_sent"] == 0) == (ep == 1 or method in (FLOOR, PRODUCTS))
        if method in ("dynmoe-expert", "megatron", "megatron-sequential"):
            assert row["rows_sent"] == 32 * k * ep
    assert by_key[2, 2, "dynmoe-rank"]["rows_sent"] < by_key[2, 2, "dynmoe-expert"]["rows_sent"]
    assert by_key[2, 2, "dense"]["rows_sent"] > by_key[2, 2, "dynmoe-expert"]["rows_sent"]
    assert files["markdown"].read_text().count("\n| ") == len(rows) + 1
    if importlib.util.find_spec("matplotlib"):
        assert files["plot"].read_bytes().startswith(b"\x89PNG")
    else:
        assert "needs matplotlib" in done.stderr


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--mean-k 99", "accepted: 1 to 16"),
        ("--mean-k two", "accepted: numbers"),
        ("--methods fast", "accepted: dynmoe-expert"),
        ("--histogram round", "accepted: balanced, skewed"),
        ("--ep 3", "divisors of the 16"),
        ("--width 12", "multiples of 8"),
        ("--tokens 0", "1 or more"),
        ("--plot time.txt", "ends in .png"),
    ],
)
def test_bad_flags_get_one_sentence(flags, wanted, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_moe_layer.main(["--cpu", *flags.split()])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert flags.split()[0] in said and wanted in said


def test_peak_counts_what_was_alive_together():
    def step():
        first = torch.empty(1000, 1000)
        second = first + 1
        del first, second
        return torch.empty(3000, 500)

    # two matrices of 4 MB at once, then one of 6 MB; torch aligns sizes by less than 1 KB
    assert measure._peak_on_cpu(step) == pytest.approx(8_000_000, abs=1000)


@pytest.mark.parametrize("histogram", ["balanced", "skewed"])
def test_no_more_memory_than_the_loop(histogram, tmp_path):
    """At the size of --quick, from a mean k of 2 on. Sizes are exact: what is counted are allocations."""
    ranks.call(check_memory, histogram, ranks=1, folder=tmp_path)


def check_memory(histogram) -> None:
    import torch.distributed as dist

    from benchmarks.competitors import build
    from benchmarks.competitors.case import Case

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    quick = {name: bench_moe_layer.QUICK[name] for name in ("tokens", "width", "expert_width", "experts")}
    for k in (2, 4, 8):
        wanted = setting(**quick, mean_k=k, histogram=histogram)
        case = Case.make(wanted, 0, "cpu", dist.group.WORLD, dist.group.WORLD)
        ours, loop = (measure.peak_bytes(build(name, case), case) for name in ("dynmoe-expert", "loop"))
        assert 0 < ours <= loop, (k, ours, loop)
    dist.destroy_process_group()


def test_findings_compare_with_the_right_rows():
    def row(method, k, seconds, peak):
        sizes = {"rows_sent": 1, "bytes_sent": 0, "peak_bytes": peak}
        return {
            "method": method,
            "mean_k": k,
            "histogram": "balanced",
            "ep": 1,
            "tokens": 1,
            "seconds": seconds,
        } | sizes

    rows = [row("dynmoe-expert", k, 1.0 + k, 10) for k in (1, 2, 4)]
    rows += [row("loop", k, 2.0 + 2 * k, 10) for k in (1, 2, 4)] + [row("dense", 2, 30.0, 40)]
    text = "\n".join(report.findings(rows))
    assert "time / loop, largest: 0.500" in text
    assert "time / dense, largest: 0.100" in text
    assert "memory / dense, largest: 0.250" in text
    assert "straight line in mean k within 0.0%" in text
    assert "floor" not in text
