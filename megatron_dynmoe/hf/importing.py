"""Writes an exported folder as a distributed checkpoint that training continues from, in any layout.

One exported tensor is read at a time and goes into the file being written, so the memory needed is one file of the
checkpoint and one shard of the folder, whatever the size of the model. All files are written to a folder beside the
target, which takes the target's name at the end. Neither megatron nor a process group is needed.
"""

import os
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dynmoe.checkpoint.folder import RELEASE, TRACKER
from megatron_dynmoe.checkpoint.writer import Chunk, write_iteration

from .beside import beside, writing
from .errors import HFImportError
from .export import DTYPES
from .folder import ModelFolder
from .mapping import table, unmapped
from .rows import Row
from .training_args import model_fields, model_flags, training_args
from .unexported import empty_states, fresh, records


@dataclass(frozen=True)
class Imported:
    """What was written, from which `source`: `bytes` are those of the weights, `shards` the files they came from.

    `new` says, a sentence each, what the folder had not. `flags` are the model's on megatron's command line.
    """

    path: Path
    source: Path
    parameters: int
    bytes: int
    shards: int
    new: tuple[str, ...]
    flags: tuple[str, ...]


def import_model(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    divisible_by: int = 128,
    max_added_experts: int = 1,
    max_file_bytes: int = 1 << 30,
    progress: bool = True,
) -> Imported:
    """Writes `model_dir` as `out_dir`/release, megatron's name for weights that begin a training.

    Args:
        model_dir: what `export` wrote, or `save_pretrained` of that model.
        out_dir: folder to make, or an empty one.
        dtype: "float32", "bfloat16" or "float16"; unset: as stored. Routers are float32 always.
        divisible_by: `--make-vocab-size-divisible-by` of the training to come; rows of padding are zeros.
        max_added_experts: its `--moe-max-added-experts`, where the number of experts adapts.
        max_file_bytes: bound on a file of the checkpoint, and on the memory needed.
        progress: show a progress bar on stderr.

    Raises:
        HFImportError: one sentence; `out_dir` is as it was.
    """
    out = Path(os.path.realpath(out_dir))  # a link stays, and what it points to is written
    _check_request(out, dtype, divisible_by, max_added_experts)
    model = ModelFolder(Path(model_dir))
    file = model.path / "config.json"
    fields = model_fields(model.config, file)
    if max_added_experts > 1 and fields["expert_slots"] is None:
        raise HFImportError(f"max_added_experts is {max_added_experts}, but the experts of {file} are fixed; leave 1.")
    args = training_args(fields, file, divisible_by=divisible_by, max_added_experts=max_added_experts)
    rows = list(table(fields, fields["vocab_size"]))
    _check_tensors(model, rows)
    place = _Place(fields, args, model, DTYPES[dtype] if dtype else None)
    chunks = [chunk for row in rows for chunk in place.chunks(row)] + list(place.unexported(max_added_experts))
    _check_dtypes(chunks)
    with writing(out, HFImportError), beside(out) as folder:
        (folder / RELEASE).mkdir()
        with tqdm(total=len(chunks), desc="import", unit="tensor", disable=not progress) as bar:
            states = empty_states(fields, place.states)
            write_iteration(
                folder / RELEASE,
                chunks,
                states,
                _common(args),
                max_file_bytes=max_file_bytes,
                progress=lambda _: bar.update(),
            )
        (folder / TRACKER).write_text(RELEASE)
    elements = {chunk.key: torch.Size(chunk.size).numel() for chunk in chunks}
    size = sum(chunk.bytes for chunk in chunks)
    flags = model_flags(args) + _precision(chunks)
    new = tuple(_what_is_new(fields, args))
    return Imported(out, model.path, sum(elements.values()), size, len(model.shards), new, tuple(flags))


def _check_request(out: Path, dtype: str | None, divisible_by: int, max_added_experts: int) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise HFImportError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}.")
    for name, value in (("divisible_by", divisible_by), ("max_added_experts", max_added_experts)):
        if value < 1:
            raise HFImportError(f"{name} is {value}; accepted: a whole number of at least 1.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise HFImportError(f"output {out} exists; give a folder that does not exist or is empty.")


def _check_tensors(model: ModelFolder, rows: list[Row]) -> None:
    """Hold names and shapes of the folder against its configuration."""
    wanted = {part.name: part.shape for row in rows for part in row.parts}
    if missing := sorted(wanted.keys() - model.shapes.keys()):
        raise HFImportError(
            f"{model.path} has no tensor {missing[0]}, which its config.json asks for ({len(missing)} are missing)."
        )
    if extra := sorted(model.shapes.keys() - wanted.keys()):
        raise HFImportError(
            f"{model.path} has a tensor {extra[0]} that its config.json has no place for ({len(extra)} in all)."
        )
    for name, shape in wanted.items():
        if model.shapes[name] != shape:
            found, said = ("x".join(map(str, numbers)) for numbers in (model.shapes[name], shape))
            raise HFImportError(f"{name} in {model.path} is {found}, its config.json says {said}.")


def _check_dtypes(chunks: list[Chunk]) -> None:
    found = defaultdict(set)
    for chunk in chunks:
        found[chunk.key].add(chunk.dtype)
    for key, dtypes in found.items():
        if len(dtypes) > 1:
            kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise HFImportError(f"{key}, one tensor of the checkpoint, comes from {kinds}; give one with --dtype.")


class _Place:
    """Where rows lie in the checkpoint: stacked over layers if all are alike, else each layer under its own key."""

    def __init__(self, fields: dict[str, Any], args: Namespace, model: ModelFolder, dtype: torch.dtype | None):
        self._fields, self._model, self._dtype = fields, model, dtype
        self._layers, self._vocabulary = args.num_layers, args.padded_vocab_size
        self._stacked = not isinstance(args.moe_layer_freq if args.num_experts else 1, list)

    def chunks(self, row: Row) -> Iterator[Chunk]:
        """The row's boxes: one for each expert, else one."""
        shape = tuple(self._vocabulary if n is None else n for n in row.shape)
        key, lead, size = self._key(row.layer, row.keys[0], shape)
        dtype = self._dtype_of(row)
        if not row.by_expert:
            read = partial(self._read, row, None, shape, dtype)
            yield Chunk(key, size, (*lead, *[0] * len(shape)), (*[1] * len(lead), *shape), dtype, read)
            return
        for slot in range(shape[0]):
            read = partial(self._read, row.expert(slot), slot, shape[1:], dtype)
            start = (*lead, slot, *[0] * len(shape[1:]))
            yield Chunk(key, size, start, (*[1] * len(lead), 1, *shape[1:]), dtype, read)

    def unexported(self, max_added_experts: int) -> Iterator[Chunk]:
        """What an export leaves out and training looks for: the first gate map, an adaptive router's state."""
        tensors = {}
        if (first := unmapped(self._fields)) is not None:
            kinds = ("num_experts", "constant_experts", "copy_experts", "zero_experts")
            columns = sum(self._fields[kind] for kind in kinds)
            tensors[first] = torch.zeros(columns, columns)
        tensors |= records(self._fields, max_added_experts)
        for (layer, name), tensor in tensors.items():
            key, lead, size = self._key(layer, name, tuple(tensor.shape))
            start, shape = (*lead, *[0] * tensor.dim()), (*[1] * len(lead), *tensor.shape)
            yield Chunk(key, size, start, shape, tensor.dtype, partial(_itself, tensor))

    def states(self, layer: int, name: str, experts: int | None) -> Iterator[str]:
        """Sharded keys of an object of a layer, or of each expert of it, as `ShardedObject.unique_key` makes them."""
        prefix, at, of = (name, [layer], [self._layers]) if self._stacked else (f"{layer}.{name}", [], [])
        for expert in range(1) if experts is None else range(experts):
            offset = at if experts is None else [*at, expert]
            extent = of if experts is None else [*of, experts]
            numbers = (".".join(map(str, values)) for values in (offset or [0], extent or [1]))
            yield f"decoder.layers.{prefix}/shard_{'_'.join(numbers)}"

    def _key(self, layer: int | None, name: str, shape: tuple[int, ...]) -> tuple[str, tuple, tuple]:
        """Key, leading offsets and whole size of a tensor of `shape`."""
        if layer is None:
            return name, (), shape
        if self._stacked:
            return f"decoder.layers.{name}", (layer,), (self._layers, *shape)
        return f"decoder.layers.{layer}.{name}", (), shape

    def _dtype_of(self, row: Row) -> torch.dtype:
        if ".router." in row.keys[0]:
            return torch.float32
        found = Counter(self._model.dtypes[part.name] for part in row.parts)
        if len(found) > 1 and self._dtype is None:
            kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise HFImportError(
                f"{row.parts[0].name} and the others of its layer in {self._model.path} are {kinds}; give one with "
                "--dtype."
            )
        return self._dtype or next(iter(found))

    def _read(self, row: Row, slot: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        covered = sum(torch.Size(part.shape).numel() for part in row.parts) == torch.Size(shape).numel()
        tensor = torch.empty(shape, dtype=dtype) if covered else fresh(row, slot, shape, self._fields).to(dtype)
        return row.fill(tensor, self._model.read)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _common(args: Namespace) -> dict[str, Any]:
    """What megatron saves beside tensors (checkpointing.py:1296); version 3 says how queries, keys and values lie."""
    args.iteration = 0
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0}
    return common | {"content_metadata": content}


def _precision(chunks: list[Chunk]) -> list[str]:
    """The flag for the dtype of most tensors; megatron's default is float32."""
    found = Counter(chunk.dtype for chunk in chunks if ".router." not in chunk.key)
    return {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(found.most_common(1)[0][0], [])


def _what_is_new(fields: dict[str, Any], args: Namespace) -> Iterator[str]:
    if padding := args.padded_vocab_size - fields["vocab_size"]:
        yield f"{padding} rows of padding in the vocabulary of {args.padded_vocab_size}: zeros"
    if slots := fields["expert_slots"]:
        free = [args.num_experts - len(kept) for kept in slots if kept]
        if any(free):
            yield (
                f"{sum(free)} inactive expert slots in {sum(map(bool, free))} layers: newly drawn; which slots are "
                "active is as it was"
            )
        yield "the records of an adaptive number of experts and their schedule: they start at iteration 0"
    if (first := unmapped(fields)) is not None:
        yield f"the gating residual's map of layer {first[0]}, the first mixture: zeros, nothing reads it"
