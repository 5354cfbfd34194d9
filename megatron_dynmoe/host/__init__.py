"""Run unmodified megatron-core 0.19 and ``megatron.training`` on a machine without CUDA.

Megatron writes ``device="cuda"``, ``torch.cuda.Stream()`` or ``param.type() == "torch.cuda.FloatTensor"`` wherever it
means the device it trains on, and does not ask whether there is one. ``enable()`` answers with the CPU, so that the
same program trains on gloo ranks, in float32 or bfloat16; loop, layouts and checkpoints are megatron's own.

    from megatron_dynmoe import host
    host.enable()                         # first thing in the program
    sys.argv[1:1] = host.default_flags()  # what megatron must be told on such a machine; the user's flags follow

Where CUDA is, ``enable()`` touches nothing but ``compile_helpers``, ``mixed groups``, ``restarts``, ``accumulation``,
``quantized saves``.
What is redirected, and why:

claim
    ``torch.cuda.is_available``, ``torch.cuda.device_count``, ``Tensor.is_cuda`` and ``Tensor.type`` speak of CUDA *to
    megatron alone*: its initialisation, optimizers and token dispatcher insist. The device is said to be a Hopper, so
    that flags are refused here that would be refused there. Everybody else (torch's DataLoader and
    optimizers, transformers, this package) hears the truth and behaves as ever: nothing is redirected for their sake.
placement
    ``"cuda"``, ``"cuda:0"`` and ``0`` as the device of a new tensor or of ``Tensor.to``, ``Tensor.cuda`` and
    ``pin_memory`` mean the CPU. (A TorchFunctionMode would do this without replacing any function, but it is off while
    ``torch.autograd.backward`` runs, where recomputation and backward functions make tensors, and in other threads.)
streams
    The CPU has one stream and is always in step; ``torch.cpu`` has such objects.
random numbers
    The CUDA generator is the CPU's, from which dropout and initialisation draw here. Two consequences are dealt with:
    megatron's tracker warns when the CPU's generator moves inside a "GPU" region, which it now should (filtered); and
    making a DataLoader iterator draws from it, on some tensor-parallel ranks only and again after a resume (put back,
    so that dropout is equal across ranks and a resumed run equals an uninterrupted one).
memory
    ``torch.cuda.memory_allocated`` and its relatives report the resident size of this process.
compilation
    ``torch.compile`` runs eagerly: megatron compiles many two-line functions, which costs minutes on a CPU.
optimizer state
    Without Transformer Engine and apex megatron falls back to torch's AdamW, whose ``step`` tensors its distributed
    optimizer cannot load: see ``host/optimizer.py``.
buckets
    Gloo gathers tensors of two dtypes in one call to wrong numbers: see ``host/buckets.py``.
compile_helpers
    On **every** machine: megatron runs ``make`` in ``megatron/core/datasets``, whose Makefile is not in the wheel, and
    exits when that fails, although the wheel has the compiled extension. Skipped where the extension imports.
mixed groups
    On **every** machine: megatron's mixed-precision optimizers mistake one parameter for another where a group has
    float32 parameters beside 16-bit ones, as with DynMoE's gate and ``--bf16``: see ``host/mixed_groups.py``.
restarts
    On **every** machine: ranks that torchrun has restarted read the addresses of those before: see
    ``host/restarts.py``.
quantized saves
    On **every** machine: weights of ``--fp8-param-gather`` go into checkpoints as numbers, not as Transformer Engine's
    pickled objects: see ``host/quantized_saves.py``.
accumulation
    Where Transformer Engine is without apex, its GEMM takes the place of apex' kernel that adds weight gradients into
    their float32 sums, which megatron's output layer demands: see ``host/accumulation.py``.

Limits: a process that is spawned, not forked, has to call ``enable()`` itself; context parallelism needs Transformer
Engine's attention; gloo has no uneven all-gather (``dispatch/moves.py`` says one as messages); the stock local
norms refuse sequence parallelism (``megatron_dynmoe.mcore.norm`` has norms that do not).
"""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from megatron_dynmoe.host.accumulation import accumulate_with_transformer_engine
from megatron_dynmoe.host.buckets import redirect_buckets
from megatron_dynmoe.host.device import redirect_device, redirect_placement
from megatron_dynmoe.host.generators import redirect_generators
from megatron_dynmoe.host.helpers import skip_compile_helpers
from megatron_dynmoe.host.memory import redirect_memory
from megatron_dynmoe.host.mixed_groups import mend_mixed_groups
from megatron_dynmoe.host.optimizer import redirect_optimizer
from megatron_dynmoe.host.quantized_saves import save_numbers
from megatron_dynmoe.host.restarts import keys_for_each_restart
from megatron_dynmoe.host.streams import redirect_streams

# The true answer, taken before anything is redirected.
_cuda_is_available = torch.cuda.is_available

_undo: ExitStack | None = None  # how to take back what enable() did; None before enable()
_active = False


def enable() -> bool:
    """Answer with the CPU what megatron asks of CUDA. Call it once, at program start; a second call changes nothing.

    Imports ``megatron.core``, which takes some seconds. Works after megatron has been imported, too.

    Returns:
        True when the redirection is active, False where ``torch.cuda.is_available()``.
    """
    global _undo, _active
    if _undo is None:
        with ExitStack() as undo:
            skip_compile_helpers(undo)
            keys_for_each_restart(undo)
            accumulate_with_transformer_engine(undo)
            save_numbers(undo)
            mend_mixed_groups(undo)  # before the redirection, which builds on it
            if not _cuda_is_available():
                _redirect(undo)
                _active = True
            _undo = undo.pop_all()
    return _active


def disable() -> None:
    """Undo ``enable()``: every attribute is the identical object it was before. Does nothing when not enabled."""
    global _undo, _active
    if _undo is not None:
        _undo.close()
    _undo, _active = None, False


def active() -> bool:
    """True between ``enable()`` and ``disable()`` on a machine without CUDA."""
    return _active


def backend() -> str:
    """The torch.distributed backend for this machine: ``"nccl"`` with CUDA, ``"gloo"`` without."""
    return "nccl" if _cuda_is_available() else "gloo"


@contextmanager
def enabled() -> Iterator[bool]:
    """``enable()`` for the length of a ``with`` block; yields what it returned. An outer ``enable()`` stays."""
    outer = _undo is not None
    try:
        yield enable()
    finally:
        if not outer:
            disable()


def default_flags() -> list[str]:
    """Flags megatron's parser needs on this machine. They belong before the user's own, which then win.

    Without Transformer Engine, megatron's own implementations, and none of the kernels that apex and CUDA extensions
    bring; without CUDA, gloo as well. With Transformer Engine none: what apex alone brings, ``enable()`` replaces.
    """
    flags = [] if _cuda_is_available() else ["--distributed-backend", "gloo"]
    if _cuda_is_available() and importlib.util.find_spec("transformer_engine") is not None:
        return flags
    return [
        *flags,
        *("--transformer-impl", "local"),
        *("--attention-backend", "unfused"),
        "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-rope-fusion",
    ]


def _redirect(undo: ExitStack) -> None:
    for redirect in (
        redirect_device,
        redirect_placement,
        redirect_streams,
        redirect_generators,
        redirect_memory,
        redirect_optimizer,
        redirect_buckets,
    ):
        redirect(undo)
    eager = torch.compiler.set_stance("force_eager")
    undo.callback(eager.__exit__, None, None, None)
