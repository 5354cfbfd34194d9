"""Writes a megatron distributed checkpoint as a Hugging Face folder that loads with `trust_remote_code`.

One slice of one key is read at a time and goes into the shard being filled, so the memory needed is one shard and one
layer's largest tensor, whatever the size of the model. All files are written to a folder beside the target, which takes
the target's name at the end: an export that fails or is interrupted leaves nothing.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megatron_dynmoe.checkpoint.reader import DistCheckpoint

from .beside import beside, writing
from .code import write_code
from .errors import ExportError
from .mapping import Piece, left_out, plan, stored_dtype
from .moved import moved_fields
from .saved_args import config_fields
from .slots import slot_fields

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written, from which `checkpoint`: `bytes` are those of the weights, `shards` their files.

    `left_out` are keys of the checkpoint that the exported model has no use for.
    """

    path: Path
    checkpoint: Path
    parameters: int
    bytes: int
    shards: int
    vocab_size: int
    left_out: tuple[str, ...] = ()


def export(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    iteration: int | None = None,
    tokenizer_model: str | Path | None = None,
    write_tokenizer: Callable[[Path, Path], Any] | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 2_000_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> Exported:
    """Exports a checkpoint of any parallel layout to `out_dir`.

    Args:
        checkpoint_dir: `SAVE` (newest iteration) or `SAVE/iter_0000100`.
        out_dir: folder to make, or a link to it; one that exists must be empty, unless `overwrite`.
        iteration: of `SAVE`, instead of the newest.
        tokenizer_model: the tokenizer of the training; `write_tokenizer(tokenizer_model, folder)` writes it in Hugging
            Face form.
        vocab_size: tokens of the vocabulary, where padding rows begin; unset: the tokenizer's, else the saved
            `vocab_size`, else all rows are kept.
        dtype: "float32", "bfloat16" or "float16"; unset: as stored. Routers are float32 always.
        max_shard_bytes: bound on a safetensors file, and on the memory needed.
        overwrite: replace a non-empty `out_dir`.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: one sentence; `out_dir` is as it was. `ExportError` where the request is at fault.
    """
    out = Path(os.path.realpath(out_dir))  # a link stays, and what it points to is written
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}.")
    check_target(out, overwrite=overwrite)
    checkpoint = DistCheckpoint(checkpoint_dir, iteration=iteration)
    fields = config_fields(checkpoint.args)
    with writing(out, ExportError), beside(out) as folder:
        tokenizer = None
        if tokenizer_model is not None and write_tokenizer is not None:
            tokenizer = _tokenizer(write_tokenizer, Path(tokenizer_model), folder)
        fields |= slot_fields(checkpoint, fields) | moved_fields(checkpoint, fields)
        fields["vocab_size"] = _vocab_size(checkpoint, vocab_size, tokenizer)
        pieces = plan(checkpoint, fields, fields["vocab_size"])
        wanted = DTYPES[dtype] if dtype else stored_dtype(checkpoint, pieces)
        tensors = _tensors(checkpoint, pieces, wanted, progress=progress)
        parameters, size, shards = _write_shards(tensors, folder, max_shard_bytes)
        _write_config(folder, fields, wanted, tokenizer)
    return Exported(out, checkpoint.path, parameters, size, shards, fields["vocab_size"], tuple(left_out(checkpoint)))


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raises ExportError unless `out` is absent, an empty folder, or a model that `overwrite` allows to replace."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"output {out} is a file; give a folder that does not exist or is empty.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"output {out} is not empty; give another folder, or --overwrite to replace it.")
    if not (out / "config.json").is_file():
        # A mistyped folder would be lost whole.
        raise ExportError(
            f"output {out} is no exported model (it has no config.json), so --overwrite does not replace it."
        )


def _tokenizer(write: Callable[[Path, Path], Any], model: Path, folder: Path) -> Any:
    """Writes the tokenizer and loads what was written, as a user will."""
    from transformers import PreTrainedTokenizerFast

    if not model.is_file():
        raise ExportError(f"tokenizer {model} is not a file; give the model file that the training data was made with.")
    try:
        write(model, folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise ExportError(f"tokenizer {model} cannot be exported ({error}).") from error


def _vocab_size(checkpoint: DistCheckpoint, asked: int | None, tokenizer: Any) -> int:
    rows = checkpoint.shapes.get("embedding.word_embeddings.weight", (None,))[0]
    saved = getattr(checkpoint.args, "vocab_size", None)
    if asked is not None:
        size, source = asked, "the requested vocabulary"
    elif tokenizer is not None:
        size, source = len(tokenizer), "the tokenizer"
    else:
        size, source = saved or rows, "the saved vocabulary"
    if rows is not None and not 0 < size <= rows:
        raise ExportError(f"{source} has {size} tokens, but the embedding in {checkpoint.path} has {rows} rows.")
    return size


def _tensors(
    checkpoint: DistCheckpoint, pieces: list[Piece], dtype: torch.dtype, *, progress: bool
) -> Iterator[tuple[str, Tensor]]:
    for piece in tqdm(pieces, desc="export", unit="tensor", disable=not progress):
        for name, tensor in piece.convert(checkpoint.read(piece.key, piece.index)).items():
            router = ".router." in name
            # A copy, so that the parts of a split tensor share no memory: safetensors refuses that.
            yield name, tensor.to(torch.float32 if router else dtype, copy=True).contiguous()


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, limit: int) -> tuple[int, int, int]:
    """Writes safetensors files of at most `limit` bytes (one tensor may exceed it) and their index.

    Returns:
        parameters, bytes and shards written.
    """
    shards: list[dict[str, Any]] = []
    filling: dict[str, Tensor] = {}
    parameters = total = filled = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.safetensors"
        save_file(filling, path, metadata={"format": "pt"})
        shards.append({"path": path, "names": list(filling)})
        filling.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if filling and filled + size > limit:
            flush()
            filled = 0
        filling[name] = tensor
        parameters, total, filled = parameters + tensor.numel(), total + size, filled + size
    flush()
    _name_shards(shards, folder, total)
    return parameters, total, len(shards)


def _name_shards(shards: list[dict[str, Any]], folder: Path, total: int) -> None:
    """Gives the files the names that from_pretrained looks for, which hold the number of shards."""
    if len(shards) == 1:
        shards[0]["path"].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard["path"].rename(folder / name)
        weight_map |= dict.fromkeys(shard["names"], name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, fields: dict[str, Any], dtype: torch.dtype, tokenizer: Any) -> None:
    """Writes config.json, generation_config.json and the modeling code that `trust_remote_code` runs."""
    from transformers import GenerationConfig

    from .configuration_dynmoe import DynMoEHFConfig

    # Without a tokenizer the ids are unknown: None is safer than LLaMA's defaults, which would end the text at token 2.
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = DynMoEHFConfig(**fields, **ids)
    except ValueError as error:
        raise ExportError(f"the checkpoint's arguments make no valid model: {error}") from error
    config.architectures = ["DynMoEForCausalLM"]
    config.dtype = dtype
    config.auto_map = {
        "AutoConfig": "configuration_dynmoe.DynMoEHFConfig",
        "AutoModel": "modeling_dynmoe.DynMoEModel",
        "AutoModelForCausalLM": "modeling_dynmoe.DynMoEForCausalLM",
    }
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_code(config.router_gate, config.router_rule, folder)
