"""Forward and backward of every preset and unit where numbers cannot be read: shapes, dtypes, devices, gradients.

"CUDA" is the meta device there (``tests/target/device.py``), groups are fake ones of 2 and 4 ranks.  The host may read
the device once a layer and pass, for the plan, and nothing may be copied that the host would wait for.
"""

from __future__ import annotations

import pytest
import torch

from tests import ranks
from tests.target.device import META, Layout, Seen, cuda_is, fake_group, watched
from tests.target.operations import known
from tests.target.passes import EXPERTS, LAYERS, B, Case, D, S, build, cases, inputs

LAYOUTS = {"EP 2": Layout(EXPERTS, expert_ranks=2), "EP 2, TP 2": Layout(EXPERTS, expert_ranks=2, tensor_ranks=2)}


def hook_dtypes(block: torch.nn.Module, layout: Layout, columns: int) -> None:
    """Hold routers and experts to what is documented of them, in every pass."""
    tokens, rows = S * B // layout.tensor_ranks, sum(layout.host_counts()[: layout.local]) * 2 * layout.tensor_ranks

    def of_router(module, args, out):
        weights, chosen = out.weights_TE, out.map_TE
        assert (weights.dtype, weights.shape) == (torch.float32, (tokens, layout.experts))
        assert (chosen.dtype, chosen.shape) == (torch.bool, weights.shape)
        assert {weights.device, chosen.device} == {META}

    def of_experts(module, args, out):
        hidden, _, weights = args
        assert (hidden.dtype, hidden.shape) == (torch.bfloat16, (rows, D))
        assert (weights.dtype, weights.shape) == (torch.float32, (rows,))
        assert (out[0].dtype, out[0].shape, out[0].device) == (torch.bfloat16, (rows, D), META)

    for layer in block.layers:
        layer.mlp.router.register_forward_hook(of_router)
        layer.mlp.experts.register_forward_hook(of_experts)
        assert layer.mlp.router.columns == columns


def built(case: Case, layout: Layout) -> torch.nn.Module:
    """The block of a case, all of it on the device, watched by hooks."""
    from megatron_dynmoe.config import DynMoEConfig

    block = build(case, layout)
    dynmoe = DynMoEConfig.from_preset(case.preset, **case.dynmoe)
    hook_dtypes(block, layout, layout.experts + dynmoe.zero_computation_experts)
    wrong = [name for name, tensor in (*block.named_parameters(), *block.named_buffers()) if tensor.device != META]
    assert not wrong, f"made elsewhere than on the device: {wrong}"
    return block


def run_pass(block: torch.nn.Module, case: Case, layout: Layout, *, training: bool) -> Seen:
    """One pass, with all that is true of it asserted."""
    block.train(training)
    x, mask, padding = inputs(layout)
    with watched(layout) as seen, torch.set_grad_enabled(training):
        out = block(x, mask, **({"padding_mask": padding} if case.padded else {}))
        assert (out.shape, out.dtype, out.device) == (x.shape, torch.bfloat16, META)
        if training:
            out.sum().backward()
    if training:
        leaves = [("input", x), *block.named_parameters()]
        without = [name for name, leaf in leaves if leaf.grad is None]
        assert not without, f"no gradient: {without}"
        for name, leaf in leaves:
            assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device) == (leaf.shape, leaf.dtype, META), name
    passes = 2 if training and case.recompute else 1
    assert seen.reads == passes * LAYERS, f"the host read the device {seen.reads} times"
    assert not seen.copies, f"the host waits for copies: {seen.copies}"
    return seen


def check_passes(layout: Layout) -> None:
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_dynmoe.mcore.tracker import RoutingTracker

    fake_group(layout)
    operations: set[str] = set()
    failed = []
    with cuda_is(META):
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device="cuda"))  # as the training loop does
        for case in cases(brief=layout.tensor_ranks > 1):
            free = dict.fromkeys(("constant", "copy", "zero"), 0)
            tracker = RoutingTracker(num_layers=LAYERS, num_experts=EXPERTS, kinds=free)
            for stats in (tracker.stats, tracker.evaluation_stats):
                stats.counts = stats.counts.to(META)  # as they are from the first pass on
            set_moe_metrics_tracker(tracker)
            try:
                block = built(case, layout)
                for training in (True, False):
                    operations |= run_pass(block, case, layout, training=training).operations
            except Exception as error:
                failed.append(f"{case}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)
    new = sorted(operations - known())
    assert not new, f"not known to have a CUDA kernel in the lowest torch supported; see README.md here: {new}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_on_meta(tmp_path, layout):
    ranks.call(check_passes, LAYOUTS[layout], ranks=1, folder=tmp_path)


def check_what_would_be_seen() -> None:
    """Each thing that the passes must not do, done."""
    layout = LAYOUTS["EP 2"]
    fake_group(layout)
    with cuda_is(META), watched(layout) as seen:
        on_device = torch.ones(3, device="cuda")
        for read in (lambda: on_device.sum().item(), lambda: bool(on_device.any()), on_device.nonzero):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()
        with pytest.raises(AssertionError, match="reads numbers of the device"):
            on_device.tolist()
        with pytest.raises(RuntimeError, match="on device cpu"):
            on_device + torch.ones(3)
        assert not seen.copies
        on_device * torch.tensor(2.0)  # a number, which goes along as an argument
        torch.ones(3).to("cuda", non_blocking=True)
        assert not seen.copies
        torch.ones(3).to("cuda")
        torch.tensor([1.0, 2.0], device="cuda")
        on_device.copy_(torch.ones(3))
        assert len(seen.copies) == 3, seen.copies


def test_the_passes_would_see(tmp_path):
    ranks.call(check_what_would_be_seen, ranks=1, folder=tmp_path)
