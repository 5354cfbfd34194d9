"""FP8 experts by Transformer Engine: each preset with each recipe, beside bfloat16."""

from megatron_dynmoe.presets import PRESETS
from tests import ranks
from tests.te import fp8_layers


def test_layers_of_each_preset_and_recipe(tmp_path):
    ranks.call(fp8_layers.check_layers, list(PRESETS), ranks=2, folder=tmp_path)


def test_scales_move_with_their_experts(tmp_path):
    ranks.call(fp8_layers.check_scales_move_with_their_experts, tmp_path, ranks=2, folder=tmp_path / "ranks")
