"""Unpickles plain data only.

What a checkpoint pickles may name any class. Here plain containers, `Namespace`, tensors and the metadata of
distributed checkpoints are built, and everything else becomes an inert :class:`Opaque`: so megatron need not be
importable to read its arguments, and a checkpoint from a stranger cannot run code.
"""

import argparse
import collections
import pickle
from types import SimpleNamespace
from typing import Any

import torch


class Opaque:
    """Stands for an object of a class that is not needed here; keeps its constructor's arguments in `args`."""

    def __init__(self, *args, **kwargs):
        self.args = args

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


# What may be built from a pickle: plain containers, tensors, and the metadata of distributed checkpoints.
_PLAIN = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}
_BUILTINS = {"set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "complex"}
_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, tensors and the metadata of distributed checkpoints; everything else is `Opaque`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if (module == "builtins" and name in _BUILTINS) or name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and (isinstance(getattr(torch, name, None), torch.dtype) or name.endswith("Storage")):
            return getattr(torch, name)
        return Opaque


class PlainPickle:
    """What `torch.load` asks of its `pickle_module`."""

    Unpickler = PlainUnpickler

    @staticmethod
    def load(file, **kwargs):
        return PlainUnpickler(file, **kwargs).load()
