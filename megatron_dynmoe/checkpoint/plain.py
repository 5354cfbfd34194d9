"""Unpickles plain data only.

A pickle is a program: it names functions and classes, and calls them. Here it may name what checkpoints of megatron do
name (two short lists below), and gets stand-ins for all of it: records that keep what they were given and compute
nothing. So megatron need not be importable, a checkpoint from a stranger runs no code here, and one that passes runs
none where the true classes are called with the same arguments: what a stand-in refuses (hooks of a tensor, fields of a
numpy dtype, another codec than latin-1, attributes set on a class) is what could be abused there.

Torch's own `weights_only=True` is not enough: torch reads the index of a distributed checkpoint and all that is no
tensor without it (`FileSystemReader.read_metadata`, `DefaultLoadPlanner.load_bytes`).
"""

import argparse
import collections
import io
import pickle
import re
from typing import Any

import torch

from .errors import NotPlainError


class _Sealed(type):
    """A pickle may not set attributes of a class (`BUILD` with slot state does)."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise NotPlainError(f"sets {name} of the class {cls.__name__}")


class Record(metaclass=_Sealed):
    """Stands for an object: its class by `name`, the arguments it was made with, the state it was given."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # (None, attributes) would set attributes of the true object one by one, `__class__` among them.
        if type(state) is tuple and type(self).name != "torch.distributed.checkpoint.metadata.TensorProperties":
            raise NotPlainError(f"sets attributes of {type(self).name}")
        self.state = state

    def field(self, name: str, default: Any = None) -> Any:
        """A field of a dataclass."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class PlainNamespace(argparse.Namespace, metaclass=_Sealed):
    """`argparse.Namespace`: the arguments that megatron saves."""

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise NotPlainError("gives a Namespace a state that is no dict of names")
        self.__dict__.update(state)


class Storage(Record):
    """The bytes of a tensor: `numel` elements of `dtype`, and the `key` of the archive's member that holds them."""

    dtype: torch.dtype | None
    key: str
    numel: int

    def __new__(cls, dtype: torch.dtype | None, key: str, numel: int) -> "Storage":
        self = object.__new__(cls)
        self.dtype, self.key, self.numel = dtype, key, numel
        return self


class PlainTensor(Record):
    """A tensor that was not built: its `storage`, `size` and `dtype`."""

    storage: Storage
    size: tuple[int, ...]
    dtype: torch.dtype | None

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, *more: Any) -> Any:
        if type(storage) is not Storage or (hooks is not None and (not isinstance(hooks, dict) or hooks)):
            raise NotPlainError("has a tensor with hooks, or of no storage")
        dtype, rest = (more[0], more[1:]) if more and isinstance(more[0], torch.dtype) else (storage.dtype, more)
        if any(rest) or type(size) not in (tuple, list):
            raise NotPlainError("has a tensor with attributes")
        self = object.__new__(cls)
        self.storage, self.size, self.dtype = storage, tuple(size), dtype
        return self

    def __setstate__(self, state: Any) -> None:
        raise NotPlainError("gives a tensor a state")


class _Parameter(Record):
    """A parameter: its tensor."""

    def __new__(cls, data: Any, grad: Any, hooks: Any) -> Any:
        if type(data) is not PlainTensor or (hooks is not None and (not isinstance(hooks, dict) or hooks)):
            raise NotPlainError("has a parameter with hooks, or of no tensor")
        return data


class _Generator(Record):
    """A generator of random numbers (graph-safe trackers keep them): its state is a seed, an offset and bytes."""

    name = "torch.Generator"

    def __setstate__(self, state: Any) -> None:
        plain = type(state) is tuple and len(state) == 3 and type(state[2]) is PlainTensor
        if not plain or type(state[0]) is not int or type(state[1]) not in (int, type(None)):
            raise NotPlainError("gives a generator another state than seed, offset and bytes")
        self.state = state


class _Codec(Record):
    """Bytes in a pickle of protocol 2."""

    def __new__(cls, text: Any, codec: Any) -> bytes:  # type: ignore[misc]
        if type(text) is not str or codec != "latin1":
            raise NotPlainError(f"decodes with {codec!r}")
        return text.encode("latin1")


class _NumpyDtype(Record):
    """A dtype of numbers; one with fields or objects could point anywhere in memory."""

    name = "numpy.dtype"

    def __new__(cls, code: Any, *flags: Any) -> "_NumpyDtype":
        if type(code) is not str or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise NotPlainError(f"has a numpy dtype {code!r}")
        return super().__new__(cls, code, *flags)  # type: ignore[return-value]

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags)
        if type(state) is not tuple or len(state) < 8 or state[2:5] != (None, None, None) or state[7:] != (0,):
            raise NotPlainError("has a numpy dtype with fields")


class _NumpyArray(Record):
    """An array of numbers, and nothing else that numpy can pickle."""

    name = "numpy.ndarray"

    def __new__(cls, kind: Any, shape: Any, code: Any) -> "_NumpyArray":
        if kind is not _NumpyClass:
            raise NotPlainError("rebuilds a numpy object that is no array")
        return super().__new__(cls)  # type: ignore[return-value]

    def __setstate__(self, state: Any) -> None:
        plain = type(state) is tuple and len(state) == 5 and type(state[2]) is _NumpyDtype and type(state[4]) is bytes
        if not plain:
            raise NotPlainError("has a numpy array that is not of numbers")


class _NumpyClass(Record):
    """`numpy.ndarray` itself, which a pickle names and never calls."""

    def __new__(cls, *args: Any) -> "_NumpyClass":
        raise NotPlainError("calls numpy.ndarray")


class _NumpyScalar(Record):
    """A number of numpy."""

    def __new__(cls, dtype: Any, raw: Any) -> "_NumpyScalar":
        if type(dtype) is not _NumpyDtype or type(raw) is not bytes:
            raise NotPlainError("has a numpy scalar that is no number")
        return super().__new__(cls)  # type: ignore[return-value]


class _Layout(Record):
    def __new__(cls, name: Any) -> "_Layout":
        if type(name) is not str:
            raise NotPlainError("has a layout that is no name")
        return super().__new__(cls, name)  # type: ignore[return-value]


class _Size(Record):
    def __new__(cls, numbers: Any = ()) -> tuple[int, ...]:  # type: ignore[misc]
        if type(numbers) not in (tuple, list) or not all(type(number) is int for number in numbers):
            raise NotPlainError("has a torch.Size that is not of integers")
        return tuple(numbers)


class _Bytes(Record):
    """`io.BytesIO`, as Transformer Engine before 2.0 kept its state."""

    def __new__(cls, raw: Any = b"") -> io.BytesIO:  # type: ignore[misc]
        if type(raw) is not bytes:
            raise NotPlainError("has a BytesIO that is not of bytes")
        return io.BytesIO(raw)


_CONTAINERS: dict[tuple[str, str], Any] = {
    ("builtins", name): kind
    for name, kind in {
        "set": set,
        "frozenset": frozenset,
        "list": list,
        "dict": dict,
        "tuple": tuple,
        "int": int,
        "float": float,
        "bool": bool,
        "str": str,
        "bytes": bytes,
        "bytearray": bytearray,
        "complex": complex,
    }.items()
} | {("collections", "OrderedDict"): collections.OrderedDict, ("torch", "Size"): _Size}


def _records(module: str, *names: str) -> dict[tuple[str, str], Any]:
    return {(module, name): _Sealed(name, (Record,), {"name": f"{module}.{name}"}) for name in names}


# What the index of a distributed checkpoint names (`.metadata`).
INDEX_NAMES = (
    _CONTAINERS
    | {("torch.serialization", "_get_layout"): _Layout}
    | _records(
        "torch.distributed.checkpoint.metadata",
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    )
    | _records("torch.distributed.checkpoint.filesystem", "_StorageInfo", "_StoragePrefix")
    | _records("pathlib", "PosixPath")  # the folder it was written to
    | _records(
        "torch.distributed.checkpoint.planner",
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    )
    # of older versions of megatron-core, which still has the classes (strategies/torch.py:89)
    | _records("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata", "MCoreSavePlan")
)

# What the objects in a checkpoint name, megatron's arguments among them: megatron/core/safe_globals.py, and what
# its unpickler of the Transformer Engine's states accepts, less the call to an unrestricted torch.load.
OBJECT_NAMES = (
    _CONTAINERS
    | {
        ("argparse", "Namespace"): PlainNamespace,
        ("_codecs", "encode"): _Codec,
        ("_io", "BytesIO"): _Bytes,
        ("numpy", "dtype"): _NumpyDtype,
        ("numpy", "ndarray"): _NumpyClass,
        ("torch._C", "Generator"): _Generator,
        ("torch._utils", "_rebuild_tensor_v2"): PlainTensor,
        ("torch._utils", "_rebuild_tensor_v3"): PlainTensor,
        ("torch._utils", "_rebuild_parameter"): _Parameter,
        ("torch.serialization", "_get_layout"): _Layout,
    }
    | {(f"numpy.{core}.multiarray", "_reconstruct"): _NumpyArray for core in ("core", "_core")}
    | {(f"numpy.{core}.multiarray", "scalar"): _NumpyScalar for core in ("core", "_core")}
    | _records("torch", "device")
    | _records("types", "SimpleNamespace")
    | _records("pathlib", "PosixPath")
    | _records("signal", "Signals")
    | _records("megatron.core.enums", "ModelType")
    | _records("megatron.core.optimizer.optimizer_config", "OptimizerConfig")
    | _records("megatron.core.rerun_state_machine", "RerunDiagnostic", "RerunMode", "RerunState")
    | _records(
        "megatron.core.transformer.enums",
        *("AttnBackend", "AttnMaskType", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope"),
    )
    | _records(
        "transformer_engine.common.recipe",
        *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"),
        *("Format", "_FormatHelper", "MMParams", "QParams"),
    )
    | _records("megatron.core.extensions.transformer_engine", "TEDelayedScaling")
)


class PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers, texts and stand-ins; refuses every other name.

    Args:
        file: binary, at the start of the pickle.
        names: what the pickle may name, and what it gets.

    Raises:
        NotPlainError: in `load`, at the first name or argument that is not plain.
    """

    def __init__(self, file: Any, names: dict[tuple[str, str], Any]) -> None:
        super().__init__(file, encoding="utf-8")
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name."""
        if module == "__builtin__":  # as protocol 2 writes it; no other module that is accepted has a second name
            module = "builtins"
        if (module, name) in self._names:
            return self._names[module, name]
        if module == "torch" and isinstance(found := torch.__dict__.get(name), torch.dtype):
            return found
        if module in ("torch", "torch.storage") and re.fullmatch(r"[A-Z][A-Za-z0-9]*Storage", name):
            return _storage_class(name)
        raise NotPlainError(f"names {module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """The storage of a tensor: torch.save's ("storage", class, key, device, elements)."""
        # Before zip archives a sixth followed, the view of another storage.
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise NotPlainError("refers to something else than a storage")
        if not (isinstance(pid[1], type) and issubclass(pid[1], _StorageClass)):
            raise NotPlainError("has a storage of an unknown class")
        if type(pid[2]) is not str or type(pid[4]) is not int:
            raise NotPlainError("has a storage without key or size")
        return Storage(_DTYPES.get(pid[1].name), pid[2], pid[4])


class _StorageClass(Record):
    """A class of storages, which a pickle names and never calls."""

    def __new__(cls, *args: Any) -> "_StorageClass":
        raise NotPlainError("calls a class of storages")


_DTYPES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8, "CharStorage": torch.int8},
    **{"ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool},
    **{"UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}


def _storage_class(name: str) -> Any:
    return _Sealed(name, (_StorageClass,), {"name": name})
