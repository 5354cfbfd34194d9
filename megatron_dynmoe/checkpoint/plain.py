"""Unpickles plain data only.

A pickle is a program: it names functions and classes, and calls them. Here it may name what checkpoints of megatron do
name (two short lists below), and gets stand-ins for all of it: records that keep what they were given and compute
nothing. So megatron need not be importable, a checkpoint from a stranger runs no code here, and one that passes runs
none where the true classes are called with the same arguments: what a stand-in refuses (hooks of a tensor, fields of a
numpy dtype, another codec than latin-1, attributes set on a class) is what could be abused there.

Torch's own `weights_only=True` is not enough: torch reads the index of a distributed checkpoint and all that is no
tensor without it (`FileSystemReader.read_metadata`, `DefaultLoadPlanner.load_bytes`).
"""

import collections
import pickle
import re
from typing import Any

import torch

from .errors import NotPlainError
from .standins import (
    DTYPES,
    Bytes,
    Codec,
    Generator,
    Layout,
    NumpyArray,
    NumpyClass,
    NumpyDtype,
    NumpyScalar,
    Parameter,
    PlainNamespace,
    PlainTensor,
    RawBytes,
    Record,
    Sealed,
    Size,
    Storage,
    StorageClass,
    storage_class,
)

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
        "bytes": RawBytes,
        "bytearray": RawBytes,
        "complex": complex,
    }.items()
} | {("collections", "OrderedDict"): collections.OrderedDict, ("torch", "Size"): Size}


def _records(module: str, *names: str) -> dict[tuple[str, str], Any]:
    return {(module, name): Sealed(name, (Record,), {"name": f"{module}.{name}"}) for name in names}


# What the index of a distributed checkpoint names (`.metadata`).
INDEX_NAMES = (
    _CONTAINERS
    | {("torch.serialization", "_get_layout"): Layout}
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
        ("_codecs", "encode"): Codec,
        ("_io", "BytesIO"): Bytes,
        ("numpy", "dtype"): NumpyDtype,
        ("numpy", "ndarray"): NumpyClass,
        ("torch._C", "Generator"): Generator,
        ("torch._utils", "_rebuild_tensor_v2"): PlainTensor,
        ("torch._utils", "_rebuild_tensor_v3"): PlainTensor,
        ("torch._utils", "_rebuild_parameter"): Parameter,
        ("torch.serialization", "_get_layout"): Layout,
    }
    | {(f"numpy.{core}.multiarray", "_reconstruct"): NumpyArray for core in ("core", "_core")}
    | {(f"numpy.{core}.multiarray", "scalar"): NumpyScalar for core in ("core", "_core")}
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
            return storage_class(name)
        raise NotPlainError(f"names {module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """The storage of a tensor: torch.save's ("storage", class, key, device, elements)."""
        # Before zip archives a sixth followed, the view of another storage.
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise NotPlainError("refers to something else than a storage")
        if not (isinstance(pid[1], type) and issubclass(pid[1], StorageClass)):
            raise NotPlainError("has a storage of an unknown class")
        if type(pid[2]) is not str or type(pid[4]) is not int:
            raise NotPlainError("has a storage without key or size")
        return Storage(DTYPES.get(pid[1].name), pid[2], pid[4])
