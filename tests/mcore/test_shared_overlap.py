"""Overlapped shared experts: the same output and gradients as without overlap, on an input that lives long enough."""

import itertools
import weakref

import torch

from tests import deep_ep_standin, ranks
from tests.mcore.layers import FREE, B, D, S, filled, layer_config, layer_of, set_up

SHARED = {"moe_shared_expert_intermediate_size": 8}


def _pass(layer, x, previous):
    """Output and all gradients of a training pass, and the output of an evaluation pass."""
    leaves = [x, *layer.parameters()] + ([] if previous is None else [previous])
    layer.train()
    out, _, *logits = layer(x, previous=previous)
    whole = torch.cat([out, *logits], dim=-1)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((whole * upstream).sum(), leaves)
    layer.eval()
    with torch.no_grad():
        return whole, layer(x, previous=previous)[0], *gradients


def check_on_equals_off() -> None:
    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    for unit in ("expert", "rank"):
        for residual in (False, True):
            dynmoe = DynMoEConfig(
                rule="top-k", topk=2, expert_input_scale=2.0, gating_residual=residual, dispatch_unit=unit, **FREE
            )
            x = torch.randn(S, B, D, requires_grad=True)
            results = []
            for overlap in (False, True):
                layer = filled(layer_of(layer_config(moe_shared_expert_overlap=overlap, **EP2, **SHARED), dynmoe))
                previous = None
                if residual:
                    generator = torch.Generator().manual_seed(5)
                    previous = torch.randn(S, B, layer.router.columns, generator=generator, requires_grad=True)
                results.append(_pass(layer, x, previous))
            for plain, overlapped in zip(*results, strict=True):
                # float32: the shared expert is added to the routed ones in another order
                torch.testing.assert_close(overlapped, plain, rtol=1e-5, atol=1e-5)


EP2 = {"expert_model_parallel_size": 2}


def check_input_lives() -> None:
    """The host must not free what the shared experts' stream may still read; autograd keeps it only while training."""
    from megatron_dynmoe.config import DynMoEConfig

    set_up()
    deep_ep_standin.install()
    flex = [{"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": b} for b in ("deepep", "hybridep")]
    for scale, kind in itertools.product((1.0, 2.0), ({}, *flex)):
        dynmoe = DynMoEConfig(expert_input_scale=scale, gating_residual=True)
        layer = layer_of(layer_config(moe_shared_expert_overlap=True, **EP2, **SHARED, **kind), dynmoe).eval()
        seen = []
        begin, end = layer.shared_experts.pre_forward_comm, layer.shared_experts.get_output

        def watched(tokens, _begin=begin, _seen=seen, **kwargs):
            _seen.append(weakref.ref(tokens))
            _begin(tokens, **kwargs)

        def ended(_end=end, _seen=seen):
            assert _seen[-1]() is not None
            _seen.append(None)
            return _end()

        layer.shared_experts.pre_forward_comm, layer.shared_experts.get_output = watched, ended
        with torch.no_grad():
            layer(torch.randn(S, B, D), previous=torch.randn(S, B, layer.router.columns))
        reference, reached_the_end = seen
        assert reached_the_end is None and reference() is None  # and no longer


def test_overlap_on_equals_off(tmp_path):
    ranks.call(check_on_equals_off, ranks=2, folder=tmp_path)


def test_input_of_the_overlapped_experts_lives_until_they_are_done(tmp_path):
    ranks.call(check_input_lives, ranks=2, folder=tmp_path)
