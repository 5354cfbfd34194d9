"""An exported folder: its configuration, and its tensors, read one at a time. Nothing in it is unpickled or run."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import HFImportError

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
MODEL_TYPE = "dynmoe"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ModelFolder:
    """A folder that `export_hf` wrote, or `save_pretrained` of the model in it.

    Attributes:
        path: the folder.
        config: `config.json`.
        shapes: name -> shape, of all tensors.
        dtypes: name -> float32, bfloat16 or float16.
        shards: the safetensors files.
    """

    def __init__(self, path: Path):
        """Reads `config.json` and the headers of all shards.

        Raises:
            HFImportError: no such folder, another model, a shard that is missing or damaged, no safetensors.
        """
        if not path.is_dir():
            raise HFImportError(f"{path} is not a folder; give one that tools/export_hf.py wrote.")
        self.path, self.config = path, _config(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        wanted = _weight_map(path)
        self.shards = sorted(set(wanted.values())) if wanted else [path / WHOLE]
        for shard in self.shards:
            self._look_into(shard, wanted)
        if wanted and (lost := sorted(set(wanted) - set(self._files))):
            raise HFImportError(f"{wanted[lost[0]]} lacks {lost[0]}, which {path / INDEX} says is in it.")
        self._open: tuple[Path, Any] | None = None

    def read(self, name: str) -> Tensor:
        """Tensor `name`; one shard is open at a time.

        Raises:
            HFImportError: the file changed, or cannot be read.
        """
        shard = self._files[name]
        try:
            if self._open is None or self._open[0] != shard:
                self._open = None  # first: two shards would be mapped otherwise
                self._open = (shard, safe_open(shard, framework="pt"))
            return self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise HFImportError(f"{shard} cannot be read: {_reason(error)}.") from error

    def _look_into(self, shard: Path, wanted: dict[str, Path]) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                entries = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118  (no mapping)
                found = [(name, tuple(entry.get_shape()), entry.get_dtype()) for name, entry in entries]
        except FileNotFoundError:
            raise HFImportError(f"{shard} is missing; {shard.parent / INDEX} names it.") from None
        except (SafetensorError, OSError) as error:
            raise HFImportError(
                f"{shard} is damaged or was cut off: {_reason(error)}; accepted: a whole safetensors file."
            ) from error
        for name, shape, dtype in found:
            if wanted and wanted.get(name) != shard:
                raise HFImportError(f"{shard} has a tensor {name} that {shard.parent / INDEX} does not place there.")
            if dtype not in _DTYPES:
                kinds = "float32, bfloat16 and float16"
                raise HFImportError(f"{name} in {shard} is stored as {dtype}; the import reads {kinds}.")
            self._files[name], self.shapes[name], self.dtypes[name] = shard, shape, _DTYPES[dtype]


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise HFImportError(f"{path} has no config.json: not an exported model.")
    config = _json(file)
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise HFImportError(f"{file} says model_type {kind!r}; accepted: {MODEL_TYPE!r}, as tools/export_hf.py writes.")
    return config


def _weight_map(path: Path) -> dict[str, Path]:
    """Name -> shard, of the index; nothing where all is in one file."""
    if (path / WHOLE).is_file():
        return {}
    if not (path / INDEX).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
        why = f"its weights are pickles ({pickles[0]}), which are not read" if pickles else "it has no weights"
        raise HFImportError(f"{path} has neither {WHOLE} nor {INDEX}: {why}; accepted: safetensors.")
    entries = _json(path / INDEX).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise HFImportError(f"{path / INDEX} has no weight_map; accepted: tensor names and their files.")
    for name, file in entries.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise HFImportError(
                f"{path / INDEX} places {name} in {file!r}; accepted: a safetensors file of its folder."
            )
    return {name: path / file for name, file in entries.items()}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HFImportError(f"{file} is no JSON ({_reason(error)}).") from None
    if not isinstance(found, dict):
        raise HFImportError(f"{file} holds a {type(found).__name__}; accepted: a JSON object.")
    return found


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
