"""Run unmodified megatron-core 0.19 and ``megatron.training`` on a machine without CUDA.

Megatron writes ``device="cuda"``, ``torch.cuda.Stream()`` or ``param.type() == "torch.cuda.FloatTensor"`` wherever it
means the device it trains on, and does not ask whether there is one. ``enable()`` answers with the CPU, so that the
same program trains on gloo ranks, in float32 or bfloat16; loop, layouts and checkpoints are megatron's own.

    from megatron_dynmoe import host
    host.enable()                         # first thing in the program
    sys.argv[1:1] = host.default_flags()  # what megatron must be told on such a machine; the user's flags follow

Where CUDA is, ``enable()`` touches nothing but ``compile_helpers``. What is redirected, and why:

claim
    ``torch.cuda.is_available``, ``torch.cuda.device_count``, ``Tensor.is_cuda`` and ``Tensor.type`` speak of CUDA *to
    megatron alone*: its initialisation, optimizers and token dispatcher insist. Everybody else (torch's DataLoader and
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
    optimizer cannot load: see ``_redirect_optimizer``.
compile_helpers
    On **every** machine: megatron runs ``make`` in ``megatron/core/datasets``, whose Makefile is not in the wheel, and
    exits when that fails, although the wheel has the compiled extension. Skipped where the extension imports.

Limits: a process that is spawned, not forked, has to call ``enable()`` itself; context parallelism needs Transformer
Engine's attention; gloo has no uneven all-gather, which expert tensor parallelism > 1 with ragged rows needs; the stock
local norms refuse sequence parallelism (``megatron_dynmoe.mcore.norm`` has norms that do not).
"""

import functools
import importlib.util
import logging
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils.data import dataloader as torch_dataloader

# The true answer, taken before anything is redirected.
_cuda_is_available = torch.cuda.is_available

_CPU = torch.device("cpu")
_INHERITED = object()

_undo: ExitStack | None = None  # how to take back what enable() did; None before enable()
_active = False


# ---- public ---------------------------------------------------------------------------------------------------------


def enable() -> bool:
    """Answer with the CPU what megatron asks of CUDA. Call it once, at program start; a second call changes nothing.

    Imports ``megatron.core``, which takes some seconds. Works after megatron has been imported, too.

    Returns:
        True when the redirection is active, False where ``torch.cuda.is_available()``.
    """
    global _undo, _active
    if _undo is None:
        with ExitStack() as undo:
            _skip_compile_helpers(undo)
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
    bring; without CUDA, gloo as well. ``[]`` where Transformer Engine is.
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


# ---- how a thing is replaced ----------------------------------------------------------------------------------------


def _replace(undo: ExitStack, owner: Any, **attributes: Any) -> None:
    """Set attributes of a module or class until ``undo`` is closed."""
    for name, value in attributes.items():
        original = vars(owner).get(name, _INHERITED)
        if original is _INHERITED:
            undo.callback(delattr, owner, name)
        else:
            undo.callback(setattr, owner, name, original)
        setattr(owner, name, value)


def _redirect(undo: ExitStack) -> None:
    _redirect_device(undo)
    _redirect_placement(undo)
    _redirect_streams(undo)
    _redirect_random(undo)
    _redirect_memory(undo)
    _redirect_optimizer(undo)
    eager = torch.compiler.set_stance("force_eager")
    undo.callback(eager.__exit__, None, None, None)


# ---- claim and placement --------------------------------------------------------------------------------------------


def _asked_by_megatron() -> bool:
    """Whether whoever called the caller of this function is in megatron (``megatron_dynmoe`` is not)."""
    module = sys._getframe(2).f_globals.get("__name__", "")
    return module.partition(".")[0] == "megatron"


def _redirect_device(undo: ExitStack) -> None:
    _replace(
        undo,
        torch.cuda,
        is_available=lambda: _asked_by_megatron(),  # the lambda is the caller that _asked_by_megatron speaks of
        device_count=lambda: int(_asked_by_megatron()),
        current_device=lambda: 0,
        set_device=lambda device: None,
        # Argument checks read the architecture; below 10 they want CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment.
        get_device_properties=lambda device=None: SimpleNamespace(name="cpu", major=10, minor=0),
        get_device_capability=lambda device=None: (10, 0),
    )


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return type(device) is int


def _on_cpu(create: Callable[..., Any]) -> Callable[..., Any]:
    """``create``, a function that takes a device, but for CUDA as the device."""

    @functools.wraps(create)
    def create_on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return create(*args, **kwargs)

    return create_on_cpu


def _redirect_placement(undo: ExitStack) -> None:
    # torch's own list of what takes a device; this call caches it, so `with torch.device(...)` knows the originals.
    listed = {create.__name__: create for create in _device_constructors()}
    names = [name for name, create in listed.items() if getattr(torch, name, None) is create]
    likes = [name for name in dir(torch) if name.endswith("_like")]
    _replace(undo, torch, **{name: _on_cpu(getattr(torch, name)) for name in (*names, *likes)})

    news = [name for name in dir(torch.Tensor) if name.startswith("new_")]
    to, kind = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def to_device_or_dtype(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        return to(tensor, *args, **kwargs)

    def kind_of_tensor(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = kind(tensor, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) and _asked_by_megatron() else name

    _replace(
        undo,
        torch.Tensor,
        **{name: _on_cpu(getattr(torch.Tensor, name)) for name in news},
        to=to_device_or_dtype,
        cuda=lambda tensor, *args, **kwargs: tensor,
        pin_memory=lambda tensor, *args, **kwargs: tensor,
        record_stream=lambda tensor, stream: None,
        type=kind_of_tensor,
        is_cuda=property(lambda tensor: _asked_by_megatron()),
    )


# ---- streams --------------------------------------------------------------------------------------------------------


class _Stream(torch.cpu.Stream):
    """torch's CPU stream, with the constructor and the methods that megatron uses of CUDA's."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        super().__init__(priority)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event(torch.cpu.Event):
    """torch's CPU event, with the constructor of CUDA's."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        super().__init__()


def _redirect_streams(undo: ExitStack) -> None:
    stream = _Stream()
    _replace(
        undo,
        torch.cuda,
        Stream=_Stream,
        Event=_Event,
        stream=torch.cpu.stream,
        current_stream=lambda device=None: stream,
        synchronize=lambda device=None: None,
    )


# ---- random numbers -------------------------------------------------------------------------------------------------


def _is_not_rng_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in str(record.msg)


def _redirect_random(undo: ExitStack) -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    for owner in (torch.cuda, torch.cuda.random):
        _replace(
            undo,
            owner,
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda new_state, device=None: torch.set_rng_state(new_state),
            manual_seed=lambda seed: torch.default_generator.manual_seed(int(seed)),
        )
    _replace(undo, torch.cuda, default_generators=(torch.default_generator,))
    # Megatron sets a state through torch's queue of calls that wait until CUDA starts, which here would be forever.
    _replace(undo, megatron_random, _lazy_call=lambda call, **_: call())

    logger = logging.getLogger(megatron_random.__name__)
    logger.addFilter(_is_not_rng_warning)
    undo.callback(logger.removeFilter, _is_not_rng_warning)

    iterator = torch_dataloader._BaseDataLoaderIter
    make_iterator = iterator.__init__

    @functools.wraps(make_iterator)
    def make_without_drawing(self: Any, loader: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            make_iterator(self, loader)

    _replace(undo, iterator, __init__=make_without_drawing)


# ---- memory ---------------------------------------------------------------------------------------------------------


def _resident(device: Any = None) -> int:
    """Bytes of this process that are in memory now; the peak where the system does not say (no /proc)."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return _resident_peak()


def _resident_peak(device: Any = None) -> int:
    """Bytes of this process that were in memory at most (Linux counts KiB, macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory_stats(device: Any = None) -> dict[str, int]:
    stats: dict[str, int] = defaultdict(int)
    for kind in ("allocated_bytes", "reserved_bytes"):
        stats[f"{kind}.all.current"], stats[f"{kind}.all.peak"] = _resident(), _resident_peak()
    return stats


def _redirect_memory(undo: ExitStack) -> None:
    _replace(
        undo,
        torch.cuda,
        memory_allocated=_resident,
        memory_reserved=_resident,
        device_memory_used=_resident,
        max_memory_allocated=_resident_peak,
        max_memory_reserved=_resident_peak,
        memory_stats=_memory_stats,
    )


# ---- optimizer state ------------------------------------------------------------------------------------------------


def _redirect_optimizer(undo: ExitStack) -> None:
    """Let megatron's distributed optimizer load a checkpoint into torch's AdamW.

    Four things are in the way in megatron/core/optimizer/distrib_optimizer.py of 0.19.2. ``state_dict``, which loading
    asks for the structure to fill, wants a ``step`` before there was one (839). Loading then puts one tensor in the
    place of all parameters' steps (1032), to which each of them would add 1. When it copies the tensors of a parameter,
    it looks for ``step`` among them (1223), but the formats that may change layout leave it out. And in the default
    format it copies into float32 parameters without ``no_grad`` (2061).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    copy_tensors = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def state_dict_of_started(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()  # what megatron does on load where fused Adam is installed
        return state_dict(self)

    @functools.wraps(copy_tensors)
    def copy_all_but_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
        with torch.no_grad():
            copy_tensors(self, model_param, {**tensors, "step": None})

    _replace(
        undo,
        DistributedOptimizer,
        state_dict=state_dict_of_started,
        _set_main_param_and_optimizer_states=copy_all_but_step,
    )


# ---- the wheel's missing Makefile -----------------------------------------------------------------------------------


def _skip_compile_helpers(undo: ExitStack) -> None:
    from megatron.core.datasets import utils

    compile_helpers = utils.compile_helpers

    @functools.wraps(compile_helpers)
    def compile_helpers_if_missing() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            compile_helpers()

    _replace(undo, utils, compile_helpers=compile_helpers_if_missing)
