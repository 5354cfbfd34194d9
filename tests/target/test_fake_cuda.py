"""Forward passes of every preset and unit on fake tensors of cuda:0, which refuse to meet any of another device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import ranks
from tests.target.device import FAKE, Layout, cuda_is_fake, fake_group, watched
from tests.target.passes import EXPERTS, Case, cases, described, inputs

LAYOUT = Layout(EXPERTS, expert_ranks=2)


def run_bare_layer(case: Case) -> None:
    """A layer alone, which nobody moves: all of it is made where its experts are, also what megatron moves later."""
    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    config, spec, dynmoe = described(case, LAYOUT, perform_initialization=False)
    layer = dynamic_layer_spec(spec.layer_specs[0], dynmoe).submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    elsewhere = [name for name, tensor in tensors if tensor.device != FAKE]
    assert not elsewhere, f"made elsewhere than on the device: {elsewhere}"
    if dynmoe.adaptive_experts:
        layer.router.take([layer.router.dynmoe.record_from, 1])  # a window is open
    x, _, padding = inputs(LAYOUT, FAKE)
    for _ in range(2 if dynmoe.gating_residual else 1):
        layer.previous = layer.carried
        with watched(LAYOUT) as seen:
            out, _ = layer(x, padding_mask=padding if case.padded else None)
        assert (out.device, out.shape, out.dtype) == (FAKE, x.shape, torch.bfloat16)
        assert seen.reads == 1 and not seen.copies


def check_bare_layers() -> None:
    fake_group(LAYOUT)
    failed = []
    with cuda_is_fake():
        for case in cases():
            if case.recompute or (case.unit == "expert" and case.megatron) or "sequential" in case.dynmoe.values():
                continue  # nothing new for devices, or counts of rows that are on the host; test_meta.py has them
            try:
                run_bare_layer(case)
            except Exception as error:
                failed.append(f"{case}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def test_bare_layers_on_fake_cuda(tmp_path):
    ranks.call(check_bare_layers, ranks=1, folder=tmp_path)


def test_fake_tensors_would_see_a_mixture():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=FAKE) @ torch.ones(2)
