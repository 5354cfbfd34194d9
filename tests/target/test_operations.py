"""The list of operations that the passes may use: each has a CUDA kernel, also in the torch at hand."""

import re
from pathlib import Path

import pytest
import torch

from tests.target.operations import LIST, known, without_cuda

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="a build without CUDA registers no kernels")


@needs_cuda_build
def test_each_has_a_kernel_in_the_torch_at_hand():
    assert len(known()) > 80
    assert without_cuda(known()) == []


@needs_cuda_build
def test_an_operation_without_one_is_named():
    # of these one is for CPUs alone, and one does not exist
    assert without_cuda({"aten.mm.default", "aten.mkldnn_linear.default", "aten.no_such.out"}) == [
        "aten.mkldnn_linear.default",
        "aten.no_such.out",
    ]


def test_the_list_is_of_the_lowest_torch_supported():
    setup = (Path(__file__).resolve().parents[2] / "setup.py").read_text(encoding="utf-8")
    (lowest,) = re.findall(r"torch>=([\d.]+)", setup)
    assert f"torch {lowest}." in LIST.read_text(encoding="utf-8").splitlines()[0]
