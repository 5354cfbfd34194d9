"""The flex dispatcher over a stand-in of DeepEP and HybridEP: equal to alltoall; what it refuses, in a sentence."""

import os

import pytest

from tests import flex_ranks, ranks

CHECKS = [
    "presets",
    "reference",
    "extremes",
    "cap",
    "bfloat16",
    "padding",
    "empty_is_not_fused",
    "uneven_tokens",
    "many_tokens_between_nodes",
    "memory_is_let_go",
]


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check, tmp_path):
    ranks.call(flex_ranks.together, check, ranks=2, folder=tmp_path)


@pytest.mark.parametrize("layout", [(2, 1, 2), (2, 2, 1), (2, 2, 2)], ids=["etp2", "tp2-ep2-etp1", "tp2-ep2-etp2"])
def test_tensor_parallel(layout, tmp_path):
    ranks.call(flex_ranks.together, "layout", *layout, ranks=max(2, layout[1] * layout[2]), folder=tmp_path)


def test_what_it_cannot_serve_is_one_sentence(tmp_path):
    ranks.call(flex_ranks.check_refusals, ranks=1, folder=tmp_path)


def test_a_library_that_does_not_fit_is_one_sentence(tmp_path):
    ranks.call(_in_folder, tmp_path, ranks=2, folder=tmp_path)


def _in_folder(root):
    folder = root / os.environ["RANK"]
    folder.mkdir()
    os.chdir(folder)
    flex_ranks.together("wrong_library")
