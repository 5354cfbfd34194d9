"""The dynamic layer over Transformer Engine's own TEGroupedMLP equals the one over torch's experts."""

from tests import ranks
from tests.te import layers


def test_equal_to_torch_experts_and_checkpoints_go_both_ways(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    ranks.call(layers.check_equal_to_torch_experts, tmp_path / "checkpoints", ranks=1, folder=tmp_path)


def test_experts_without_rows(tmp_path):
    ranks.call(layers.check_experts_without_rows, ranks=1, folder=tmp_path)
