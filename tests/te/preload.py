"""Imported once by the fork server of this leg's ranks: Transformer Engine over the stand-ins, then as ever.

Four things differ from ``tests/preload.py``. Transformer Engine asks for the device as megatron does, and gets the
same answer. The device claims to be Hopper, whose FP8 recipes and rules these are. Its generator
is the CPU's. And the flags that go before the
user's are those of a machine with a GPU, but for the backend of its collectives.
"""

import os
import sys
from types import SimpleNamespace

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as pretrain.sh sets it for tensor and context parallelism

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing of this is about compilers, which take ten seconds a function

import torch

from tests.te import start

start.transformer_engine()

import tests.preload  # noqa: E402, F401
from megatron_dynmoe import host  # noqa: E402
from megatron_dynmoe.host import device  # noqa: E402


def asked_by_megatron_or_transformer_engine() -> bool:
    """``host.device._asked_by_megatron``, with one more who asks."""
    module = sys._getframe(2).f_globals.get("__name__", "")
    return module.partition(".")[0] in ("megatron", "transformer_engine")


def claim_hopper() -> None:
    """After ``host.enable()``: what is still to be said of the device."""
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="cpu", major=9, minor=0, multi_processor_count=132
    )


def draw_from_the_one_generator() -> None:
    """Recomputation under FP8 is Transformer Engine's, which puts the generator of the GPU back."""
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


device._asked_by_megatron = asked_by_megatron_or_transformer_engine
claim_hopper()
draw_from_the_one_generator()
flags_of_this_machine = host.default_flags


def flags_of_a_gpu() -> list[str]:
    host._cuda_is_available = lambda: True
    try:
        return ["--distributed-backend", "gloo", *flags_of_this_machine()]
    finally:
        host._cuda_is_available = lambda: False


host.default_flags = flags_of_a_gpu
