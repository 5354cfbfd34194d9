"""Controllers in training: every layout counts each token once and moves the setting as one rank does.

A relay as in test_adaptive_parallel.py: each leg loads what the one before saved, in another layout.  The second relay
is float16 with a loss scale that overflows, so that the optimizer skips steps, over layers that are stacked in a
checkpoint.
"""

import gc
import json
import re

import pytest
import torch

from tests import ranks
from tests.layouts import LAYOUTS, MODEL, read_scalars

STEPS, TOKENS = 2, 8 * 32
RESUMABLE = "--use-distributed-optimizer"
LEGS = {
    "serial": LAYOUTS["serial"],
    "ep2": LAYOUTS["ep2"],
    "recompute": LAYOUTS["recompute"],
    "tp2-sp": LAYOUTS["tp2-sp"],
    "recompute-moe": LAYOUTS["recompute-moe"],
    "pp2": LAYOUTS["pp2"],
    "twice": (1, "--rerun-mode report_stats"),
    "tp2-ep2": LAYOUTS["tp2-ep2"],
    "dp2": (2, "--overlap-grad-reduce --overlap-param-gather"),
}
SKIPPING = {"half": LAYOUTS["serial"], "half-pp2": LAYOUTS["pp2"], "half-ep2": LAYOUTS["ep2"]}
HALF = "--fp16 --initial-loss-scale 16777216 --hysteresis 1 --loss-scale-window 1000 --moe-layer-freq 1".split()


def pretrain(argv, out):
    """The training entry with both controllers; their states before the first step and at the end go to ``out``."""
    from megatron.core.rerun_state_machine import RerunMode
    from megatron.training import initialize

    from megatron_dynmoe.mcore.controllers import Driver
    from tests import toy_controllers

    toy_controllers.install()
    seen, before_pass = {}, Driver.before_pass

    def look(self, chunk):
        known = len(self.chunks)
        before_pass(self, chunk)
        if len(self.chunks) > known:
            seen.update(states(self))

    Driver.before_pass = look
    if "report_stats" in argv:  # which Megatron's parser knows, and its enumeration under another name
        initialize.RerunMode = lambda _: RerunMode.REPORT_DETERMINISM_STATS
    try:
        return ranks.pretrain(argv)
    finally:
        (driver,) = [thing for thing in gc.get_objects() if isinstance(thing, Driver)]
        torch.save((seen, states(driver)), out / f"state{torch.distributed.get_rank()}.pt")


def states(driver):
    found = {}
    for layer in driver.layers:
        router = layer.router
        assert router.dynmoe.top_p == router.host[1]["top_p"] == float(router.top_p)
        both = router.state(0) | router.state(1)
        found[router.layer_index] = {name: value.detach().clone() for name, value in both.items()}
    return found


def run(legs, name, *extra, folder):
    folder.mkdir(parents=True)
    count, flags = legs[name]
    logs = ["--tensorboard-dir", str(folder / "tb"), "--moe-metrics-file", str(folder / "metrics.jsonl")]
    argv = [*MODEL, RESUMABLE, *flags.split(), *logs, *extra]
    output = ranks.call(pretrain, argv, folder, ranks=count, folder=folder).output(count - 1)
    return {
        "records": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "top_p": read_scalars(folder / "tb", "top_p"),
        "states": [torch.load(folder / f"state{rank}.pt") for rank in range(count)],
        "output": output,
    }


def relay(legs, root, *extra, steps=STEPS):
    results = {}
    for leg, name in enumerate(legs, start=1):
        end = str(steps * leg)
        places = ("--save", str(root / "checkpoint"), "--load", str(root / "checkpoint"))
        stop = ("--save-interval", end, "--exit-interval", end)
        results[name] = run(legs, name, *places, *stop, *extra, folder=root / name)
    return results


def whole(states, when):
    """States by layer over all ranks, which must say the same of a layer that several hold."""
    merged = {}
    for rank in states:
        for layer, state in rank[when].items():
            for name, value in state.items():
                assert torch.equal(value, merged.setdefault(layer, {}).setdefault(name, value)), (layer, name)
    return merged


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(LEGS, "serial", "--exit-interval", str(STEPS * len(LEGS)), folder=tmp_path_factory.mktemp("s") / "s")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return relay(LEGS, tmp_path_factory.mktemp("relay"))


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    return relay(SKIPPING, tmp_path_factory.mktemp("half"), *HALF, "--log-interval", "3", steps=9)


@pytest.mark.parametrize("leg", LEGS)
def test_every_token_counts_once_in_every_layout(single, results, leg):
    first = STEPS * list(LEGS).index(leg) + 1
    expected = {record["iteration"]: record for record in single["records"]}
    assert [record["iteration"] for record in results[leg]["records"]] == [first, first + 1]
    for record in results[leg]["records"]:
        alone = expected[record["iteration"]]
        tokens = {str(layer): TOKENS * record["iteration"] for layer in (0, 2, 3)}
        assert record["tokens_seen_by_layer"] == record["tokens_summed_by_layer"] == tokens
        for name in ("rows_seen_by_layer", "top_p_by_layer", "toy_events"):  # integers, and what follows from them
            assert record[name] == alone[name], name
        for layer, sums in record["hidden_sums_by_layer"].items():
            # float32 sums of 256 numbers of size 1 a step, in another order, over up to 18 steps
            assert sums == pytest.approx(alone["hidden_sums_by_layer"][layer], abs=18 * 256 * 2**-22)


def test_the_setting_moves_and_is_logged(single):
    values = [record["top_p_by_layer"] for record in single["records"]]
    assert len({tuple(value.values()) for value in values}) == len(values)
    assert values[-1]["0"] != values[-1]["2"]
    for record in single["records"]:
        mean = sum(record["top_p_by_layer"].values()) / 3
        assert record["top_p"] == mean == pytest.approx(single["top_p"][record["iteration"]], rel=2**-23)  # float32
        assert f" [toy] iteration {record['iteration']}: layer 0 took " in single["output"]
    assert " top p: " in single["output"]
    assert "hidden_sums" not in single["records"][0]  # vectors are logged by layer alone


@pytest.mark.parametrize("legs", [LEGS, SKIPPING], ids=["apart", "stacked"])
def test_what_is_saved_is_loaded_in_another_layout(results, skipping, legs):
    found = results if legs is LEGS else skipping
    for before, after in zip(list(legs), list(legs)[1:], strict=False):
        saved, loaded = whole(found[before]["states"], 1), whole(found[after]["states"], 0)
        assert saved.keys() == loaded.keys()
        for layer, state in saved.items():
            for name, value in state.items():
                assert torch.equal(value, loaded[layer][name]) and value.dtype == loaded[layer][name].dtype, name
            assert state["top_p"].dtype == state["sum_D"].dtype == torch.float32  # also in a float16 model


def test_a_skipped_step_changes_nothing(skipping):
    taken, skipped = 0, 0
    for leg in skipping.values():
        lines = re.findall(r" iteration +(\d+)/.*number of skipped iterations: +(\d+)", leg["output"])
        counts = [int(count) for iteration, count in lines if int(iteration) % 3 == 0]  # it reports the first one, too
        assert len(counts) == len(leg["records"]) == 3
        for record, count in zip(leg["records"], counts, strict=True):
            taken, skipped = taken + 3 - count, skipped + count
            assert set(record["tokens_seen_by_layer"].values()) == {taken * TOKENS}
            assert set(record["tokens_summed_by_layer"].values()) == {taken * TOKENS}
            assert {event["iteration"] for event in record["toy_events"]} <= set(
                range(record["iteration"] - 2, record["iteration"] + 1)
            )
            assert len(record["toy_events"]) == 4 * (3 - count)
        for state in whole(leg["states"], 1).values():
            assert int(state["steps"][0]) == taken and state["sum_D"].isfinite().all()
    assert skipped >= 2 and taken >= 2


def test_a_controller_that_the_checkpoint_lacks_is_refused_and_one_too_many_is_said(tmp_path):
    places = ["--save", str(tmp_path / "save"), "--load", str(tmp_path / "save"), "--save-interval", "1"]
    ranks.call(ranks.pretrain, [*MODEL, *places, "--exit-interval", "1"], ranks=1, folder=tmp_path / "without")
    refused = ranks.start(with_both, [*MODEL, *places, "--exit-interval", "2"], ranks=1, folder=tmp_path / "with")
    assert refused.wait() == [2]
    assert "has no sum_D, tokens_summed of the routers, which the controller Averager keeps" in refused.output()
    places = [place.replace("save", "other") if place.startswith("/") else place for place in places]
    ranks.call(with_both, [*MODEL, *places, "--exit-interval", "1"], ranks=1, folder=tmp_path / "first")
    dropped = ranks.call(ranks.pretrain, [*MODEL, *places, "--exit-interval", "2"], ranks=1, folder=tmp_path / "second")
    assert "has steps, sum_D, tokens_seen, tokens_summed, top_p of the routers, which nothing" in dropped.output()


def with_both(argv):
    from tests import toy_controllers

    toy_controllers.install()
    return ranks.pretrain(argv)
