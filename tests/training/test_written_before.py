"""A checkpoint that was written before is resumed as it would have gone on then."""

import pytest

from tests import ranks
from tests.layouts import read_metrics
from tests.written_before import NAMES, recorded, unpacked


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_is_resumed_to_the_recorded_losses(tmp_path, name: str) -> None:
    """In that of DynMoE a window is open: mask, records and schedule decide which experts are added, and when."""
    folder = unpacked(name, tmp_path)
    expected, _ = recorded(folder)
    metrics = folder / "metrics.jsonl"
    places = ["--load", str(folder / "save"), "--moe-metrics-file", str(metrics), "--exit-interval", "8"]
    ranks.call(ranks.pretrain, [*expected["flags"].split(), *places], ranks=1, folder=folder)
    got = {record["iteration"]: record for record in read_metrics(metrics)}
    assert sorted(got) == [5, 6, 7, 8]
    for step in expected["steps"]:
        record = got[step["iteration"]]
        # Equal bits on the machine that wrote them. On another, sums in another order are 1e-7 off, which four steps of
        # Adam at 1e-2 may make a thousand times larger; a lost moment, mask or schedule moves the loss by 1e-2.
        for key in ("lm_loss", "load_balancing_loss"):
            assert record[key] == pytest.approx(step[key], rel=1e-4), (step["iteration"], key)
        assert record["experts_per_token"] == pytest.approx(
            step["experts_per_token"], abs=2 / 128
        )  # a token at an edge
        assert record.get("active_experts") == step.get("active_experts")
        assert record.get("expert_changes") == step["expert_changes"] or step["expert_changes"] is None
