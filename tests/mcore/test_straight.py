"""The layer's one straight forward: it keeps nothing, copies little, and megatron-core's hooks do the same."""

from __future__ import annotations

import gc
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import deep_ep_standin, ranks
from tests.mcore.layers import CAPTURED, B, D, E, S, filled, layer_config, layer_of, set_up

SHARED = {"moe_shared_expert_intermediate_size": 8}
PRESETS = [
    ("dynamic-moe", {}, {}),
    ("dynamic-moe", {"dispatch_unit": "rank", "expert_input_scale": 2.0}, SHARED | {"moe_shared_expert_overlap": True}),
    ("switch", {}, {"moe_token_dispatcher_type": "allgather"}),
    ("gshard", {"residual": True}, SHARED),
    ("dynmoe", {}, {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}),
    ("moe-plus-plus", {}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    ("moe-plus-plus", {"residual": True}, SHARED),
    ("moe-plus-plus-released", {}, {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}),
]


def start() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    deep_ep_standin.install()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)


def layers():
    """A filled layer of every case, and the case."""
    from megatron_dynmoe.config import DynMoEConfig

    for preset, ours, theirs in PRESETS:
        dynmoe = DynMoEConfig.from_preset(preset, z_loss_coeff=0.1, **ours)
        yield (
            filled(layer_of(layer_config(expert_model_parallel_size=2, **theirs), dynmoe)),
            (preset, ours, theirs),
        )


def held(layer) -> dict[str, dict[str, int]]:
    """The identity of every attribute of the layer, its parts and its dispatcher, modules and tensors included."""
    parts = {name or "layer": vars(module) for name, module in layer.named_modules()}
    parts["dispatcher"] = vars(layer.token_dispatcher)
    if (manager := getattr(layer.token_dispatcher, "_comm_manager", None)) is not None:
        parts["manager"] = vars(manager)
    found = {}
    for name, attributes in parts.items():
        groups = {key: attributes[key] for key in ("_parameters", "_buffers", "_modules") if key in attributes}
        inner = {f"{key}.{one}": id(value) for key, group in groups.items() for one, value in group.items()}
        # Python makes a bound method or a small integer anew; what an attribute is equal to by identity suffices.
        found[name] = inner | {key: id(value) for key, value in attributes.items()}
    return found


def check_nothing_is_written() -> None:
    """Names and identities of all attributes are those from before, and no attribute holds a graph."""
    for layer, case in layers():
        residual = layer.dynmoe.gating_residual
        previous = torch.randn(S, B, layer.router.columns) if residual else None
        for training in (True, False):
            layer.train(training)
            before = held(layer)
            out, _, *logits = layer(x := torch.randn(S, B, D, requires_grad=True), previous=previous)
            assert held(layer) == before, case
            if training:
                (out.sum() + sum(one.sum() for one in logits)).backward()
                assert held(layer) == before, case
            seen = [weakref.ref(tensor) for tensor in (x, out, *logits)]
            del x, out, logits
            gc.collect()  # cycles through autograd's nodes it would not find
            deadline = time.monotonic() + 20
            while any(ref() is not None for ref in seen) and time.monotonic() < deadline:
                time.sleep(0.01)  # gloo's thread lets go of buffers a moment after they are said to be ready
            # What holds one of these holds the pass's graph.
            assert [ref() is None for ref in seen] == [True] * len(seen), (case, training)


def by_hooks(layer, x):
    """The layer's pass as the schedule that interleaves micro-batches makes it: the graph is cut between the parts."""
    parts = []

    def cut(*tensors):
        detached = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        parts.append((tensors, detached))
        return detached

    manager = getattr(layer.token_dispatcher, "_comm_manager", SimpleNamespace())
    shared = layer.shared_experts_compute(x)
    rows, weights, shared = cut(*layer.preprocess(x, *layer.route(x)), shared)
    manager.token_probs = weights  # as the schedule does for flex (gpt/fine_grained_callables.py)
    rows, weights = cut(*layer.dispatch(rows, weights))
    manager.dispatched_probs = weights
    (rows,) = cut(layer.routed_experts_compute(rows, weights)[0])
    out = layer.postprocess(layer.combine(rows), shared)

    def backward(gradient):
        out.backward(gradient)
        for tensors, detached in reversed(parts):
            used = [i for i, late in enumerate(detached) if late is not None and late.grad is not None]
            torch.autograd.backward([tensors[i] for i in used], [detached[i].grad for i in used])

    return out, backward


def check_hooks() -> None:
    """Outputs and gradients of the hooks, with the graph cut between them, are those of the straight forward."""
    for layer, case in layers():
        results = []
        upstream = torch.randn(S, B, D, generator=torch.Generator().manual_seed(3))
        values = torch.randn(S, B, D, generator=torch.Generator().manual_seed(5))
        if layer.shared_expert_overlap or layer.moe_layer_recompute:
            continue  # the schedule refuses both (transformer_config.py:2698, 2708)
        for straight in (True, False):
            layer.zero_grad()
            x = values.clone().requires_grad_()
            if straight:
                out, _ = layer(x)
                out.backward(upstream)
            else:
                out, backward = by_hooks(layer, x)
                backward(upstream)
            gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
            results.append([out, x.grad, *(gradients[name] for name in sorted(gradients))])
        for mine, theirs in zip(*results, strict=True):
            # float32: zero-computation experts are added before or after a token's rows are summed
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, case=case: f"{case}: {m}")


def check_captured() -> None:
    """A layer whose router may be replayed from a CUDA graph runs by the hooks, and computes the same."""
    from megatron_dynmoe.config import DynMoEConfig

    x, outputs = torch.randn(S, B, D), []
    for extra in ({}, CAPTURED):
        dynmoe = DynMoEConfig(expert_input_scale=2.0)
        layer = filled(layer_of(layer_config(expert_model_parallel_size=2, **SHARED, **extra), dynmoe))
        assert layer.captured == bool(extra)
        outputs.append(layer(x)[0])
        assert layer.token_dispatcher._between is None
    assert torch.equal(*outputs)


def check_all() -> None:
    start()
    for check in (check_nothing_is_written, check_hooks, check_captured, check_dispatcher_by_itself):
        print(check.__name__, flush=True)
        check()


def test_a_pass_keeps_nothing_and_hooks_equal_it(tmp_path):
    """No attribute is written; hooks in a cut graph give the same; a dispatcher sends the map that it is given."""
    ranks.call(check_all, ranks=2, folder=tmp_path)


def check_dispatcher_by_itself() -> None:
    """The dispatcher sends the map that it is given, whatever plan was begun before, and several passes in a row."""
    from megatron_dynmoe.config import DynMoEConfig

    for unit in ("expert", "rank"):
        layer = layer_of(layer_config(expert_model_parallel_size=2), DynMoEConfig(dispatch_unit=unit))
        dispatcher, x = layer.token_dispatcher, torch.randn(S, B, D)
        full = torch.ones(S * B, E, dtype=torch.bool)
        dispatcher.begin(full)
        for map_TE in (torch.zeros_like(full), full, torch.arange(E) < torch.arange(S * B).unsqueeze(1) % (E + 1)):
            weights = torch.where(map_TE, 0.5, 0.0)
            rows, probs = dispatcher.dispatch_preprocess(x, map_TE, weights)
            sent = map_TE.sum() if unit == "expert" else map_TE.view(-1, 2, E // 2).any(dim=-1).sum()
            assert len(rows) == len(probs) == int(sent), (unit, len(rows))
            rows, sizes, probs = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(rows, probs))
            assert int(sizes.sum()) == len(rows) == len(probs) and (probs == 0.5).all()
            rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows * probs.unsqueeze(1)))
            out = dispatcher.combine_postprocess(rows)
            # each row is half its token: sums of at most 4 halves in float32
            torch.testing.assert_close(out, x * map_TE.sum(dim=1).view(S, B, 1) / 2, rtol=1e-6, atol=1e-6)


def test_a_gating_residual_copies_twice_a_layer(tmp_path):
    ranks.call(check_copies, ranks=1, folder=tmp_path)


class Copies(TorchDispatchMode):
    """Counts operations that only copy, whose result has as many elements as the hidden states or more."""

    COPIES = ("cat", "clone", "copy_", "_to_copy", "contiguous", "slice_backward", "constant_pad_nd", "stack")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.COPIES and isinstance(out, torch.Tensor) and out.numel() >= WIDE * T:
            self.seen.append(name)
        return out


T, WIDE = 64, 256  # wide, so that no other tensor of a layer is as large


def count_copies(residual: bool, first: bool) -> list[int]:
    """Copies of T x D in the forward and the backward pass of a whole transformer layer."""
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore.specs import dynamic_layer_spec
    from tests.mcore.layers import stock_spec

    config = layer_config(num_layers=3, hidden_size=WIDE, moe_ffn_hidden_size=16, ffn_hidden_size=16)
    spec = dynamic_layer_spec(stock_spec(config), DynMoEConfig(gating_residual=residual, rule="top-k", topk=1))
    layer = spec.module(config, spec.submodules, layer_number=1 if first else 2)
    x = torch.randn(T, 1, WIDE + (E if residual and not first else 0), requires_grad=True)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1)
    with Copies() as forward:
        out, _ = layer(x * 1, attention_mask=mask)
    gradient = torch.randn_like(out)
    with Copies() as backward:
        out.backward(gradient)
    return [len(forward.seen), len(backward.seen)]


def check_copies() -> None:
    set_up()  # one rank: how many rows it gets does not depend on the routing
    plain = count_copies(residual=False, first=False)
    for first in (True, False):
        carrying = count_copies(residual=True, first=first)
        extra = [got - without for got, without in zip(carrying, plain, strict=True)]
        print(f"copies of T x D beyond {plain}: {extra}", flush=True)
        # The output with logits beside it; and the gradient of the input that had some.
        assert extra == [1, 0 if first else 1], (first, plain, carrying)


@pytest.mark.parametrize("cut", [True, False])
def test_a_bridge_takes_gradients_across_a_cut(cut):
    from megatron_dynmoe.mcore.hooks import Bridge

    def product(bridged):
        a, b = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0], requires_grad=True)
        early, carried = a * a, a * b
        if not bridged:
            (early.exp() * carried).sum().backward()
            return a.grad, b.grad
        bridge = Bridge(carried)
        early = bridge.leave(early)
        between = early.detach().requires_grad_() if cut else early
        first, arrived = bridge.arrive(between.exp())
        (first * arrived).sum().backward()
        if cut:
            early.backward(between.grad)
        return a.grad, b.grad

    for mine, theirs in zip(product(True), product(False), strict=True):
        assert torch.equal(mine, theirs)
