"""The MoE++ benchmark: its methods compute what they claim, maps have exact counts, and a run writes what it should."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import bench_moe_plus_plus as bench
from benchmarks import zero_computation_case as cases
from megatron_dynmoe import reference

ROOT = Path(__file__).resolve().parents[2]


def setting(**changes) -> cases.Setting:
    shape = {"tokens": 24, "width": 16, "expert_width": 24, "ffn": 8, "free": 4, "tau": 0.75}
    return cases.Setting(**shape | changes)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    # float32 sums of at most 48 products (assignments), a few in a row, in another order
    allowed = 64 * torch.finfo(torch.float32).eps * (1 + expected.abs().max())
    assert (got - expected).abs().max() <= allowed


def gradients(method, case: cases.Case) -> list[torch.Tensor]:
    case.clear()
    method(case).backward(case.grad_TD)
    names = ("x_TD", "weights_TC", "select_C2D", "values_CD")
    return [getattr(case, name).grad.clone() for name in names]


@pytest.mark.parametrize("free", [3, 4, 8])
def test_fused_equals_the_loop(free):
    case = cases.Case.make(setting(free=free, tau=0.25), "cpu", torch.float32)
    out = cases.fused(case)
    assert out.abs().max() > 0
    assert_close(out, cases.loop(case))
    fused, loop = gradients(cases.fused, case), gradients(cases.loop, case)
    # The fused expression has a gradient for every weight, the loop only for chosen ones, as top-2 passes it on.
    fused[1], loop[1] = fused[1] * case.map_TC, loop[1] * case.map_TC
    for got, expected in zip(fused, loop, strict=True):
        assert expected.abs().max() > 0
        assert_close(got, expected)


@pytest.mark.parametrize("tau", [0.1, 0.75])
def test_both_layers_equal_the_dense_reference(tau):
    case = cases.Case.make(setting(tau=tau), "cpu", torch.float32)
    experts = case.fc1_EGD, case.fc2_EDF
    assert_close(cases.plain(case), reference.dense_moe(case.x_TD, case.plain_weights_TE, *experts))
    ffn = reference.dense_moe(case.x_TD, case.weights_TC[:, :8], *experts)
    free = reference.free_experts(case.x_TD, case.weights_TC[:, 8:], case.select_C2D, case.values_CD, 1)
    assert ffn.abs().max() > 0 and free.abs().max() > 0
    assert_close(cases.moe_plus_plus(case), ffn + free)


@pytest.mark.parametrize(("ffn", "free"), [(8, 4), (16, 4), (32, 8), (3, 3)])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1])
def test_routing_is_what_the_balance_loss_intends(ffn, free, tau):
    tokens = 999
    case = cases.Case.make(setting(tokens=tokens, ffn=ffn, free=free, tau=tau), "cpu", torch.float32)
    for map_TC in (case.plain_map_TE, case.map_TC):
        assert (map_TC.sum(dim=1) == 2).all()
    share = tau * ffn / (tau * ffn + free)
    rows = case.map_TC[:, :ffn].sum()
    assert abs(rows - 2 * tokens * share) <= 0.5
    for group in (case.plain_map_TE, case.map_TC[:, :ffn], case.map_TC[:, ffn:]):
        counts = group.sum(dim=0)
        assert counts.max() - counts.min() <= 1
    assert ((case.weights_TC > 0) == case.map_TC).all()
    assert setting(ffn=ffn, free=free, tau=tau).predicted == pytest.approx(1 / share)


def test_pairs_are_drawn_at_random():
    # Of 40000 tokens with 4 equally likely experts a sixth should have each pair; 4 standard deviations are 300.
    map_TE = cases.draw_map([20000] * 4, torch.Generator().manual_seed(0))
    for first in range(4):
        for second in range(first):
            together = int((map_TE[:, first] & map_TE[:, second]).sum())
            assert abs(together - 40000 / 6) < 300


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match=r"counts are \[9, 1, 0\]"):
        cases.draw_map([9, 1, 0], torch.Generator())


def test_ratios_are_of_one_round(monkeypatch):
    # Every round is twice as slow as the one before: a neighbour. Within a round the ratios stay what they are.
    seconds = {cases.plain: 6.0, cases.moe_plus_plus: 4.0, cases.fused: 1.0, cases.loop: 3.0}
    seconds |= dict(zip(cases.FORWARD_ONLY.values(), (5.0, 3.0), strict=True))
    calls = []

    def time_one(method, case, **how):
        calls.append(method)
        return seconds[method] * 2 ** ((len(calls) - 1) // 6)

    monkeypatch.setattr(bench, "time_one", time_one)
    rounds = []
    row = bench.measure(setting(), None, repeats=3, backward=False, advance=lambda: rounds.append(1))
    assert (row["gain"], row["loop_over_fused"]) == (1.5, 3.0)
    assert row["predicted"] == pytest.approx(10 / 6) and row["reached"] == pytest.approx(0.9)
    assert row["gemms_reached"] == pytest.approx(1.0)
    assert row["plain_seconds"] == 6.0 * 4  # the median of rounds 1 to 3; round 0 warms up
    assert len(rounds) == 4 and all(set(calls[i : i + 6]) == set(seconds) for i in range(0, 24, 6))
    assert len({tuple(calls[i : i + 6]) for i in range(0, 24, 6)}) > 1, "the order should change"


def test_findings_name_the_smallest():
    def row(tau, reached, over):
        row = {"ffn": 8, "free": 4, "tau": tau, "reached": reached, "loop_over_fused": over, "load": tau}
        return row | {"gemms_reached": 1.0}

    text = "\n".join(bench.findings([row(0.1, 0.9, 3.0), row(0.5, 1.1, 2.0)]))
    assert "predicted gain: smallest 0.900 (8+4, tau 0.1), mean 1.000" in text
    assert "alone: smallest 2.000 (8+4, tau 0.5), mean 2.500" in text
    assert "GEMMs alone: smallest 0.900, mean 1.000" in text
    assert "0.1 to 0.5" in text


@pytest.mark.parametrize("backward", [False, True])
def test_a_run_writes_rows_and_table(tmp_path, backward):
    files = {"json": tmp_path / "rows.json", "markdown": tmp_path / "new" / "table.md"}
    tiny = "--tokens 32 --width 16 --expert-width 16 --sizes 4+3,8+4 --tau 0.5,1 --repeats 1".split()
    tiny += ["--backward"] * backward
    flags = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    program = [sys.executable, str(ROOT / "benchmarks" / "bench_moe_plus_plus.py"), "--quick", "--cpu", *tiny, *flags]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(files["json"].read_text())
    keys = [(r["ffn"], r["free"], r["tau"]) for r in rows]
    assert keys == [(*size, tau) for size, tau in product([(4, 3), (8, 4)], [0.5, 1])]
    for row in rows:
        assert all(row[f"{name}_seconds"] > 0 for name in cases.METHODS) and row["backward"] == backward
        assert (row["gemms_reached"] is None) == backward
        assert row["reached"] == pytest.approx(row["gain"] / row["predicted"])
    text = files["markdown"].read_text()
    assert (
        text.count("\n| ") == len(rows) + 1
        and ("forward and backward" in text) == backward
        and "wanted at least 0.95" in text
    )
    assert text in done.stdout


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--sizes 8", "as 8+4"),
        ("--sizes 8+2", "both at least 3"),
        ("--tau 0", "above 0, at most 1"),
        ("--tau half", "above 0, at most 1"),
        ("--width 12", "multiples of 8"),
        ("--tokens 0", "1 or more"),
        ("--cpu-time --threads 2", "with --threads 1"),
    ],
)
def test_bad_flags_get_one_sentence(flags, wanted, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--cpu", *flags.split()])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert flags.split()[0] in said and wanted in said
