"""Shade each token of a text by the FFN experts it used, as one HTML page that needs nothing else.

Reads a folder written by dynmoe-export, or a megatron checkpoint with --tokenizer-model. See docs/watching.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.plugins import load_plugins
from megatron_dynmoe.programs.command import add_plugin_flag, command_parser, sigterm_like_ctrl_c
from megatron_dynmoe.report.metrics_file import ReportError
from megatron_dynmoe.report.token_costs import KINDS, TokenCosts, token_costs
from megatron_dynmoe.report.token_page import PageHead, token_page
from megatron_dynmoe.report.token_text import tokens_of_text

EXAMPLE = "dynmoe-report tokens --model exported --text-file chapter.txt --output report.html"


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(__doc__, example=EXAMPLE, allow_abbrev=False, prog=prog)
    result.add_argument("--model", type=Path, required=True, help="exported folder; or SAVE, or SAVE/iter_0000100")
    result.add_argument("--tokenizer-model", type=Path, help="tokenizer of the training, for a megatron checkpoint")
    text = result.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="the text itself")
    text.add_argument("--text-file", type=Path, help="a file with the text, in UTF-8")
    result.add_argument("--window", type=int, help="tokens to read at a time (default: the most the model can)")
    result.add_argument("--output", type=Path, required=True, help="the page; ends in .html")
    add_plugin_flag(result)
    return result


def read_text(args: argparse.Namespace) -> str:
    """The text, with its line breaks as they are."""
    try:
        if args.text_file is None:
            args.text.encode()  # bytes that are no UTF-8 arrive as lone surrogates
            return args.text
        return args.text_file.read_bytes().decode()
    except OSError as error:
        raise ReportError(f"--text-file {args.text_file} cannot be read ({error.strerror}).") from None
    except UnicodeError:
        name = "--text" if args.text_file is None else f"--text-file {args.text_file}"
        raise ReportError(f"{name} is not text in UTF-8; convert it first.") from None


def check_output(args: argparse.Namespace) -> None:
    """Refuses a page that could not be written, before the work."""
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"--output {args.output}: the suffix is {args.output.suffix!r}; accepted: .html, .htm.")
    if args.output.is_dir():
        raise ReportError(f"--output {args.output} is a folder; give the name of a file.")
    source = args.text_file
    if source is not None and source.exists() and args.output.exists() and args.output.samefile(source):
        raise ReportError(f"--output {args.output} is the text itself; give another name.")


@contextmanager
def exported_model(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The exported folder and the name of the model; the export of a checkpoint lasts as long as the block."""
    if not args.model.is_dir():
        raise ReportError(f"--model {args.model} is no folder; give one that dynmoe-export wrote, or a checkpoint.")
    if (args.model / "config.json").is_file():
        if args.tokenizer_model is not None:
            raise ReportError(
                f"--model {args.model} is an exported model, which has its own tokenizer; leave --tokenizer-model out."
            )
        check_exported(args.model)
        yield args.model, str(args.model)
        return
    if args.tokenizer_model is None:
        raise ReportError(
            f"--model {args.model} has no config.json, so it is no exported model; for a checkpoint give "
            "--tokenizer-model too."
        )
    from megatron_dynmoe.hf.export import export
    from megatron_dynmoe.programs.export_hf import write_tokenizer

    with tempfile.TemporaryDirectory(prefix="token_report.") as folder:
        done = export(
            args.model, Path(folder) / "model", tokenizer_model=args.tokenizer_model, write_tokenizer=write_tokenizer
        )
        yield done.path, str(done.checkpoint)


def check_exported(folder: Path) -> None:
    """Refuses a folder that is of another model, or has no tokenizer."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ReportError(
            f"{folder / 'config.json'} names no model_type; give a folder that dynmoe-export wrote."
        ) from None
    if model_type != "dynmoe":
        raise ReportError(
            f"{folder / 'config.json'}: model_type is {model_type!r}; it must be 'dynmoe', as dynmoe-export writes it."
        )
    if not (folder / "tokenizer.json").is_file():
        raise ReportError(f"{folder / 'tokenizer.json'} is missing; give a folder exported with its tokenizer.")


def load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model, on the accelerator if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The tokenizer runs no code of the folder, but transformers reads config.json first and would ask.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # whatever a damaged file makes transformers, tokenizers or safetensors raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReportError(f"{folder} cannot be loaded ({reason[:300]}).") from None
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def costs_of_text(text: str, tokenizer: Any, model: Any, *, window: int) -> TokenCosts:
    """What each token of ``text`` uses, read ``window`` tokens at a time."""
    # verbose: no advice about texts longer than the model reads, they are cut into windows here
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    config = model.config
    if not ids:
        raise ReportError("the text has no tokens; give at least one character.")
    if max(ids) >= config.vocab_size:
        raise ReportError(
            f"the tokenizer gives token {max(ids)}, but the model has a vocabulary of {config.vocab_size}; give the "
            "tokenizer of the training."
        )
    tokens = tokens_of_text(text, ids=ids, pieces=tokenizer.convert_ids_to_tokens(ids), spans=encoded["offset_mapping"])
    kinds = {kind: getattr(config, f"{kind}_experts", None) or 0 for kind in KINDS}
    maps, maps_TZ = routing_maps(model, ids, window=window, kinds=sum(kinds.values()) > 0)
    layers = [index for index, is_moe in enumerate(config.moe_layers) if is_moe]
    return token_costs(tokens, maps, layers=layers, maps_TZ=maps_TZ, experts_of_kind=kinds)


def routing_maps(model: Any, ids: list[int], *, window: int, kinds: bool) -> tuple[list[Any], list[Any] | None]:
    """For each MoE layer the FFN experts of all tokens [T, E], and with ``kinds`` the zero-computation ones [T, Z]."""
    import torch
    from tqdm import tqdm

    names = ["routing_map", "free_routing_map"] if kinds else ["routing_map"]
    parts: dict[str, list[Any]] = {name: [] for name in names}
    with torch.inference_mode(), tqdm(total=len(ids), desc="tokens", unit="token") as progress:
        for start in range(0, len(ids), window):
            piece = ids[start : start + window]
            wanted = {f"output_{name}": True for name in names}
            # one row of logits: nobody reads them, and all would need more memory than the rest of the pass
            outputs = model(torch.tensor([piece], device=model.device), use_cache=False, logits_to_keep=1, **wanted)
            for name in names:
                parts[name].append([layer.cpu() for layer in outputs[name]])
            progress.update(len(piece))
    joined = [[torch.cat(layer) for layer in zip(*parts[name], strict=True)] for name in names]
    return joined[0], joined[1] if kinds else None


def window_of(asked: int | None, config: Any) -> int:
    """Tokens to read at a time."""
    most = config.max_position_embeddings
    if asked is not None and not 1 <= asked <= most:
        raise ReportError(f"--window is {asked}; accepted: 1 to {most}, the positions that the model knows.")
    return asked or most


def method_in_words(kind: str, name: str, config: Any) -> str:
    """A gate or rule with those of its settings that papers have a letter for, such as ``top-p, p = 0.4``."""
    from megatron_dynmoe.routers.registry import fields_of, methods

    parts = [name]
    for field in (f for k, n, method in methods() if (k, n) == (kind, name) for f in fields_of(method)):
        value = getattr(config, field.metadata.get("exported") or field.name, None)
        if field.metadata.get("symbol") and value is not None:
            parts.append(f"{field.metadata['symbol']} = {value:g}")
    return ", ".join(parts)


def rule_in_words(config: Any) -> str:
    """How the model chooses experts."""
    from megatron_dynmoe.routers.router_config import RouterConfig

    words = method_in_words("rule", config.router_rule, config)
    gate = method_in_words("gate", getattr(config, "router_gate", RouterConfig.gate), config)
    cap = config.max_experts_per_token
    kinds = {kind: getattr(config, f"{kind}_experts", None) or 0 for kind in KINDS}
    parts = [f"rule {words}", f"gate {gate}"]
    if cap is not None:
        parts.append(f"at most {cap} experts per token")
    if any(kinds.values()):
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        parts.append(f"zero-computation experts: {counts}")
    return "; ".join(parts)


def page_of(args: argparse.Namespace, text: str) -> str:
    """Load, route, draw."""
    with exported_model(args) as (folder, name):
        tokenizer, model = load(folder)
        config = model.config
        if not any(config.moe_layers):
            raise ReportError(f"{name} has no MoE layers, so its tokens all cost the same.")
        window = window_of(args.window, config)
        costs = costs_of_text(text, tokenizer, model, window=window)
        head = PageHead(
            model=name,
            rule=rule_in_words(config),
            parameters=model.num_parameters(),
            expert_parameters=3 * config.hidden_size * config.moe_intermediate_size,  # gate, up and down of SwiGLU
            window=window,
        )
        return token_page(costs, head)


def write(path: Path, page: str) -> None:
    """The page, whole or not at all."""
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise ReportError(f"{error.filename} cannot be written ({error.strerror}).") from None
    finally:
        if beside.is_file():
            beside.unlink()


@one_sentence("token_report")
@sigterm_like_ctrl_c
def main(argv: list[str] | None = None, *, prog: str | None = None) -> int:
    """Parse, read, route, write; 1 with one sentence on stderr."""
    args = parser(prog).parse_args(argv)
    load_plugins(args.moe_plugin)
    try:
        check_output(args)
        text = read_text(args)
        write(args.output, page_of(args, text))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{args.output} is as it was.") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
