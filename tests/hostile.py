"""Hostile archives: each runs, or writes, a marker file when something unpickles it the ordinary way."""

import builtins
import collections
import io
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Call:
    """Unpickles to the result of a call."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.said = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.said

    def __call__(self) -> None:
        """So that the result of a call can be called in turn."""


class Named:
    """Unpickles to what a name means, without a call."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class NamingPickler(pickle._Pickler):  # the one in Python, which lets a name be written as it is
    """Pickles :class:`Named`."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if type(obj) is Named:
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, save_persistent_id)


def pickled(thing: Any) -> bytes:
    """The bytes of one pickle."""
    file = io.BytesIO()
    NamingPickler(file, 2).dump(thing)
    return file.getvalue()


def archive(thing: Any) -> bytes:
    """An archive of torch.save in which `thing` is pickled."""
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def things(marker: Path) -> dict[str, Any]:
    """Objects that do harm when they are unpickled, by name."""
    code = f"open({str(marker)!r}, 'w').close()"
    touch = f"touch {marker}"
    system = Call(os.system, touch)
    hooks = collections.OrderedDict({0: system})
    tensor = Call(torch._utils._rebuild_tensor_v2, torch.FloatStorage(1), 0, (1,), (1,), True, hooks)
    return {
        "os.system": system,
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "open": Call(builtins.open, str(marker), "w"),
        "getattr": Call(Call(getattr, Call(__import__, "os"), "system"), touch),
        "import": Call(__import__, "this"),
        "partial": Call(partial(os.system, touch)),
        "numpy load": Call(np.load, str(marker) + ".npy"),
        "numpy save": Call(np.savetxt, str(marker), [0]),
        "numpy memmap": Call(np.memmap, str(marker), "uint8", "w+", 0, (1,)),
        "numpy runstring": Call(np.testing._private.utils.runstring, code, {}),
        "map": Call(list, Call(map, os.system, [touch])),
        "numpy objects": np.array([system], dtype=object),
        "numpy fields": np.zeros(1, dtype=[("a", "i4"), ("b", "f8")]),
        "torch load": Call(torch.load, str(marker)),
        "torch hub": Call(torch.hub.load, str(marker), "x"),
        "load_from_bytes": Call(torch.storage._load_from_bytes, pickled(system)),
        "jit load": Call(torch.jit.load, str(marker)),
        "hooks": tensor,
        "in a list": [[{"a": (system,)}]],
        "as a key": {system: 1},
        "in bytes": pickled(system),
        "in bytes in bytes": pickled({"x": pickled(system)}),
        "in a buffer": io.BytesIO(archive(system)),
        "in a tensor of bytes": torch.frombuffer(bytearray(pickled(system)), dtype=torch.uint8),
        "archive in a tensor": torch.frombuffer(bytearray(archive(system)), dtype=torch.uint8),
        "class of an object": Call(Namespace, state=(None, {"__class__": Namespace})),
        "path write": Call(Path.touch, marker),
        "codec": Call(__import__("_codecs").encode, "x", "rot13"),
        "subprocess": Call(__import__("subprocess").getoutput, touch),
        "unpickler": Call(pickle.loads, pickled(system)),
        "bytes without end": Call(bytes, 1 << 33),
        "fake megatron": Named("megatron.core.enums", "os"),
        "dotted": Named("argparse", "Namespace.__init__"),
    }


def archives(marker: Path) -> dict[str, bytes]:
    """Archives that are not what torch.save writes, or hold something hostile, by name."""
    system = pickled(Call(os.system, f"touch {marker}"))
    good, bad = archive({"args": 1}), archive(Call(os.system, f"touch {marker}"))
    made = {name: archive(thing) for name, thing in things(marker).items() if not isinstance(thing, Named)}
    by_hand = {name: pickled(thing) for name, thing in things(marker).items() if isinstance(thing, Named)}
    # GLOBAL, then BUILD with (None, {"x": "y"}): sets an attribute of the class itself
    by_hand["attribute of a class"] = b"\x80\x02cargparse\nNamespace\n(N}U\x01xU\x01ystb."
    by_hand["a foreign storage"] = b"\x80\x02U\x04elseQ."
    by_hand["a storage of a class"] = b"\x80\x02(U\x07storagecos\nsystem\nU\x010U\x03cpuK\x01tQ."
    made |= {name: _archive_of(raw) for name, raw in by_hand.items()}
    made |= {
        "a bare pickle": system,
        "torchscript": _torchscript(),
        "constants.pkl": _with_member(good, "archive/constants.pkl", b"x"),
        "code": _with_member(good, "archive/code/__torch__.py", b"x"),
        "two data.pkl": _with_member(good, "archive/data.pkl", system),
        "another case": _with_member(good, "archive/DATA.PKL", system),
        "another folder": _with_member(good, "other/data.pkl", system),
        "something before": system + good,
        "something behind": good + system,
        "a comment": _with_comment(good, bad),
        "two archives": bad + good,
        "archive in an archive": _with_member(good, "archive/data/7", bad),
        "compressed": _compressed(bad),
        "another size in the local header": _patched(good, struct.pack("<4s", b"PK\3\4"), 6, b"\1"),
        "directory elsewhere": _moved_end(bad, good),
    }
    return made


def _archive_of(raw: bytes) -> bytes:
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name, content in {"data.pkl": raw, "byteorder": b"little"}.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return file.getvalue()


def _torchscript() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), file)
    return file.getvalue()


def _with_member(raw: bytes, name: str, content: bytes) -> bytes:
    file = io.BytesIO(raw)
    with zipfile.ZipFile(file, "a") as out:
        out.writestr(name, content)
    return file.getvalue()


def _with_comment(raw: bytes, comment: bytes) -> bytes:
    file = io.BytesIO(raw)
    with zipfile.ZipFile(file, "a") as out:
        out.comment = comment
    return file.getvalue()


def _compressed(raw: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    return file.getvalue()


def _patched(raw: bytes, signature: bytes, at: int, value: bytes) -> bytes:
    place = raw.index(signature) + at
    return raw[:place] + value + raw[place + len(value) :]


def _moved_end(hidden: bytes, shown: bytes) -> bytes:
    """Python's reader finds the directory of `shown`, torch's that of `hidden`, which its locator points to."""
    both = bytearray(hidden + shown)
    end64 = hidden.rindex(b"PK\6\6")
    struct.pack_into("<Q", both, len(both) - 22 - 20 + 8, end64)
    return bytes(both)
