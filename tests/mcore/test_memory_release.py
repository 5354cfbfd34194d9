"""What a pass took is given back: exchanges, received rows, tensors and graphs, with Python's collector off.

A reference cycle through autograd's nodes is invisible to the collector while later graphs hold it, so nothing may
need the collector.  A tensor that only a graph holds has no Python object, but the graph has: the contexts of its
functions.  So tensors and contexts are counted.
"""

import gc
import time
import weakref

import torch

from tests import ranks
from tests.mcore.layers import D, layer_config, set_up

MICRO_BATCHES = 3
MODELS = {
    "top-p": {"top_p": 0.5, "load_balance_coeff": 0.01, "entropy_coeff": 0.01},
    "moe++": {
        "rule": "top-k",
        "topk": 2,
        "zero_experts": 1,
        "copy_experts": 1,
        "constant_experts": 2,
        "gating_residual": True,
        "load_balance_coeff": 0.01,
    },
    "dynmoe": {"gate": "cosine", "rule": "top-any", "adaptive_experts": True, "diversity_coeff": 0.01},
}
RECOMPUTE = {
    "off": {},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
SHARED = {"moe_shared_expert_intermediate_size": 16}
CASES = [
    (model, unit, recompute, {} if model == "top-p" else SHARED)
    for model in MODELS
    for unit in ("expert", "rank")
    for recompute in RECOMPUTE
]
CASES += [("top-p", "auto", "off", SHARED | {"moe_shared_expert_overlap": True})]


def _block(model, unit, recompute, extra):
    """Two transformer layers, as a model holds them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.mcore.specs import dynamic_layer_spec

    config = layer_config(
        num_layers=2, expert_model_parallel_size=2, hidden_dropout=0.0, **RECOMPUTE[recompute], **extra
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    block = TransformerBlock(config, dynamic_layer_spec(spec, DynMoEConfig(dispatch_unit=unit, **MODELS[model])))
    for layer in block.layers:
        if model == "dynmoe":
            layer.mlp.router.take([layer.mlp.router.dynmoe.record_from, 1])  # a window is open
    return block


class Watch:
    """Weak references to every exchange and to what it hands out."""

    def __init__(self) -> None:
        from megatron_dynmoe.dispatch.moves import Exchange

        self.seen, self.alive = 0, weakref.WeakSet()
        begin, land, wait = Exchange.__init__, Exchange.land, Exchange.wait

        def remember(thing):
            self.seen += 1
            self.alive.add(thing)
            return thing

        def remember_exchange(exchange, *args):
            begin(exchange, *args)
            remember(exchange)

        Exchange.__init__ = remember_exchange
        Exchange.land = lambda exchange: remember(land(exchange))
        Exchange.wait = lambda exchange: remember(wait(exchange))


def _micro_batch(block, *, training: bool) -> None:
    x = torch.randn(12, 2, D, requires_grad=training)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    with torch.set_grad_enabled(training):
        out = block(x, mask)
    if training:
        out.square().mean().backward()


def _new(watch: Watch) -> list[str]:
    """Exchanges, received rows, tensors and graph nodes that have come since gc.freeze()."""
    tracked = (torch.Tensor, torch._C._FunctionBase)
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), tracked)]
    # megatron replaces the state of its random numbers, which is of bytes; nothing else is
    found = [thing for thing in found if getattr(thing, "dtype", None) != torch.uint8]
    return [type(thing).__name__ for thing in (*found, *watch.alive)]


def check_nothing_is_left() -> None:
    set_up()
    watch = Watch()
    gc.disable()
    for case in CASES:
        block = _block(*case)
        for training in (True, False):
            block.train(training)
            _micro_batch(block, training=training)  # gradients are made, and what else is made once
            gc.collect()
            gc.freeze()
            for _ in range(MICRO_BATCHES):
                watch.seen = 0
                _micro_batch(block, training=training)
                deadline = time.monotonic() + 5
                while _new(watch) and time.monotonic() < deadline:
                    time.sleep(0.01)  # gloo's thread lets go of buffers a moment after they are said to be ready
                assert watch.seen >= 12  # two layers, three exchanges each, and what they received
                assert not (left := _new(watch)), f"{case}, training {training}: {left}"


def test_a_pass_leaves_nothing_behind(tmp_path):
    ranks.call(check_nothing_is_left, ranks=2, folder=tmp_path)
