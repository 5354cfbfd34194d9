"""Stand-ins for what a checkpoint's pickles name: records that keep what they were given and compute nothing."""

import argparse
import io
import re
from typing import Any

import torch

from .errors import NotPlainError


class Sealed(type):
    """A pickle may not set attributes of a class (`BUILD` with slot state does)."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise NotPlainError(f"sets {name} of the class {cls.__name__}")


class Record(metaclass=Sealed):
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


class PlainNamespace(argparse.Namespace, metaclass=Sealed):
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
    """A tensor that was not built: its `storage`, where in it (`offset`, `stride`), `size` and `dtype`."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, *more: Any) -> Any:
        if type(storage) is not Storage or (hooks is not None and (not isinstance(hooks, dict) or hooks)):
            raise NotPlainError("has a tensor with hooks, or of no storage")
        dtype, rest = (more[0], more[1:]) if more and isinstance(more[0], torch.dtype) else (storage.dtype, more)
        if any(rest) or type(size) not in (tuple, list):
            raise NotPlainError("has a tensor with attributes")
        if type(stride) not in (tuple, list) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise NotPlainError("has a tensor whose place in its storage is not said in whole numbers")
        self = object.__new__(cls)
        self.storage, self.size, self.dtype = storage, tuple(size), dtype
        self.offset, self.stride = offset, tuple(stride)
        return self

    def __setstate__(self, state: Any) -> None:
        raise NotPlainError("gives a tensor a state")


class Parameter(Record):
    """A parameter: its tensor."""

    def __new__(cls, data: Any, grad: Any, hooks: Any) -> Any:
        if type(data) is not PlainTensor or (hooks is not None and (not isinstance(hooks, dict) or hooks)):
            raise NotPlainError("has a parameter with hooks, or of no tensor")
        return data


class Generator(Record):
    """A generator of random numbers (graph-safe trackers keep them): its state is a seed, an offset and bytes."""

    name = "torch.Generator"

    def __setstate__(self, state: Any) -> None:
        plain = type(state) is tuple and len(state) == 3 and type(state[2]) is PlainTensor
        if not plain or type(state[0]) is not int or type(state[1]) not in (int, type(None)):
            raise NotPlainError("gives a generator another state than seed, offset and bytes")
        self.state = state


class RawBytes(Record):
    """`bytes` and `bytearray` of bytes; of a number they would fill the memory."""

    def __new__(cls, raw: Any = b"") -> bytes:  # type: ignore[misc]
        if type(raw) is not bytes:
            raise NotPlainError("makes bytes of something else than bytes")
        return raw


class Codec(Record):
    """Bytes in a pickle of protocol 2."""

    def __new__(cls, text: Any, codec: Any) -> bytes:  # type: ignore[misc]
        if type(text) is not str or codec != "latin1":
            raise NotPlainError(f"decodes with {codec!r}")
        return text.encode("latin1")


class NumpyDtype(Record):
    """A dtype of numbers; one with fields or objects could point anywhere in memory."""

    name = "numpy.dtype"

    def __new__(cls, code: Any, *flags: Any) -> "NumpyDtype":
        if type(code) is not str or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise NotPlainError(f"has a numpy dtype {code!r}")
        return super().__new__(cls, code, *flags)  # type: ignore[return-value]

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags)
        if type(state) is not tuple or len(state) < 8 or state[2:5] != (None, None, None) or state[7:] != (0,):
            raise NotPlainError("has a numpy dtype with fields")


class NumpyArray(Record):
    """An array of numbers, and nothing else that numpy can pickle."""

    name = "numpy.ndarray"

    def __new__(cls, kind: Any, shape: Any, code: Any) -> "NumpyArray":
        if kind is not NumpyClass:
            raise NotPlainError("rebuilds a numpy object that is no array")
        return super().__new__(cls)  # type: ignore[return-value]

    def __setstate__(self, state: Any) -> None:
        plain = type(state) is tuple and len(state) == 5 and type(state[2]) is NumpyDtype and type(state[4]) is bytes
        if not plain:
            raise NotPlainError("has a numpy array that is not of numbers")


class NumpyClass(Record):
    """`numpy.ndarray` itself, which a pickle names and never calls."""

    def __new__(cls, *args: Any) -> "NumpyClass":
        raise NotPlainError("calls numpy.ndarray")


class NumpyScalar(Record):
    """A number of numpy."""

    def __new__(cls, dtype: Any, raw: Any) -> "NumpyScalar":
        if type(dtype) is not NumpyDtype or type(raw) is not bytes:
            raise NotPlainError("has a numpy scalar that is no number")
        return super().__new__(cls)  # type: ignore[return-value]


class Layout(Record):
    def __new__(cls, name: Any) -> "Layout":
        if type(name) is not str:
            raise NotPlainError("has a layout that is no name")
        return super().__new__(cls, name)  # type: ignore[return-value]


class Size(Record):
    def __new__(cls, numbers: Any = ()) -> tuple[int, ...]:  # type: ignore[misc]
        if type(numbers) not in (tuple, list) or not all(type(number) is int for number in numbers):
            raise NotPlainError("has a torch.Size that is not of integers")
        return tuple(numbers)


class Bytes(Record):
    """`io.BytesIO`, as Transformer Engine before 2.0 kept its state."""

    def __new__(cls, raw: Any = b"") -> io.BytesIO:  # type: ignore[misc]
        if type(raw) is not bytes:
            raise NotPlainError("has a BytesIO that is not of bytes")
        return io.BytesIO(raw)


class StorageClass(Record):
    """A class of storages, which a pickle names and never calls."""

    def __new__(cls, *args: Any) -> "StorageClass":
        raise NotPlainError("calls a class of storages")


DTYPES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8, "CharStorage": torch.int8},
    **{"ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool},
    **{"UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}


def storage_class(name: str) -> Any:
    return Sealed(name, (StorageClass,), {"name": name})
