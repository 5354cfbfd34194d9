"""A bare layer, and a bare router, on a GPU that is not there: fake tensors on cuda:0 refuse operations across devices.

Training moves a model to its device as a whole. Who builds one layer, as from megatron-core's spec, does not: then each
tensor is where its module made it.  Forward passes only: autograd has no such device to run on.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests import ranks

EXPERTS, WIDTH, TOKENS = 8, 32, 12
SIZES = {"width": WIDTH, "experts": EXPERTS, "perform_initialization": False}  # states of random numbers are not fake


@contextmanager
def fake_cuda():
    """After ``host.enable()``: what it sends to the CPU goes to cuda:0 of fake tensors instead."""
    from megatron_dynmoe.host import device

    gpu, to = torch.device("cuda:0"), torch.Tensor.to
    rows = EXPERTS * [2] + [TOKENS] + EXPERTS * [2] + [TOKENS] + [2 * EXPERTS, TOKENS]  # a plan of two rows an expert
    read = mock.patch.object(FakeTensor, "tolist", lambda tensor: rows)  # fake tensors have no numbers
    made, moved = mock.patch.object(device, "_CPU", gpu), lambda tensor, *args, **kwargs: to(tensor, gpu)
    applied = mock.patch.object(torch.nn.Module, "_apply", apply_by_replacing)
    with FakeTensorMode(), made, read, applied, mock.patch.object(torch.Tensor, "cuda", moved):
        yield


def apply_by_replacing(module, fn, recurse=True):
    """``Module._apply`` as it is for tensors that cannot be exchanged in place, which fake ones cannot."""
    for child in module.children():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            there = module._parameters[name] = torch.nn.Parameter(fn(parameter.detach()))
            vars(there).update({key: value for key, value in vars(parameter).items() if key not in vars(there)})
    module._buffers.update({name: fn(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return module


def check_bare_layers() -> None:
    from benchmarks.gpu import layers
    from megatron_dynmoe.config import PRESETS, DynMoEConfig

    layers.start_megatron()
    cases = [(fields, unit, {}) for fields in PRESETS.values() for unit in ("expert", "rank")]
    shared = {"moe_shared_expert_intermediate_size": 16}
    cases += [(PRESETS["dynamic-moe"] | {"residual": True}, "expert", shared)]
    cases += [({"max_rows_per_token": 1.5, "max_experts_per_token": 2, "top_p": 0.9}, "expert", {})]
    with fake_cuda():
        for fields, unit, extra in cases:
            dynmoe = DynMoEConfig(expert_backend="torch", dispatch_unit=unit, **fields)
            layer = layers.build(dynmoe, dtype=torch.bfloat16, **SIZES, **extra)
            for training in (True, False):
                layer.train(training)
                out, _ = layer(torch.randn(TOKENS, 1, WIDTH, device="cuda", dtype=torch.bfloat16))
                assert out.shape == (TOKENS, 1, WIDTH) and out.device == torch.device("cuda:0"), (fields, unit)


def check_bare_routers() -> None:
    from benchmarks.gpu import layers
    from megatron_dynmoe.config import PRESETS, DynMoEConfig

    layers.start_megatron()
    with fake_cuda():
        for fields in PRESETS.values():
            dynmoe = DynMoEConfig(expert_backend="torch", **fields)
            # as a model is built that --use-cpu-initialization leaves where it is: the experts stay, the router follows
            layer = layers.build(dynmoe, **SIZES, use_cpu_initialization=True)
            assert {tensor.device.type for tensor in layer.router.parameters()} == {"cpu"}
            weights, chosen = layer.router(torch.randn(TOKENS, 1, WIDTH, device="cuda"))
            assert weights.device == chosen.device == torch.device("cuda:0"), fields
            assert {t.device.type for t in (*layer.router.parameters(), *layer.router.buffers())} == {"cuda"}
            before = layer.router.weight
            layer.router(torch.randn(TOKENS, 1, WIDTH, device="cuda"))
            assert layer.router.weight is before  # moved once


def test_a_bare_layer_computes_on_the_device_that_it_was_made_on(tmp_path):
    ranks.call(check_bare_layers, ranks=1, folder=tmp_path)


def test_a_bare_router_follows_its_input_to_the_device(tmp_path):
    ranks.call(check_bare_routers, ranks=1, folder=tmp_path)
