"""Which failures are the user's, and how they and all others are said.

A mistake of the user becomes one sentence and exit code 2.  What is known to be one: our own refusals
(:class:`~megatron_dynmoe.errors.UserError`), what Megatron's parser and its checks of flags raise (assertions, mostly),
what the operating system says of a path, and a checkpoint that does not load.  Any other exception may be a fault of
ours, of Megatron or of torch: it keeps its traceback, below a sentence that says where it came from, and ends with 1.
"""

from __future__ import annotations

import ast
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from traceback import FrameSummary

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.errors import UserError, os_sentence, user_sentence
from megatron_dynmoe.launch import outcome
from megatron_dynmoe.training import nan

# What Megatron's configuration calls what a flag calls otherwise.
_ALIASES = {
    "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "virtual_pipeline_model_parallel_size": "num_layers_per_virtual_pipeline_stage",
    "total_model_size": "tensor_model_parallel_size",
}
_MOST = 400  # characters of somebody else's message
_PACKAGES = ("megatron_dynmoe", "megatron", "torch", "transformers", "numpy")


def sentence_of(error: BaseException) -> str | None:
    """The sentence for a mistake of the user; ``None``: not known to be one, so the traceback has to be kept."""
    if isinstance(error, (CheckpointException, CheckpointingException)):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return f"the checkpoint {_checkpoint()}cannot be loaded or saved: {reason}"
    sentence = user_sentence(error)
    if isinstance(error, OSError) and sentence is not None and error.filename is None:
        return f"{sentence.rstrip('.')}, said when {_place(_frames(error)[-1:])} wrote."
    return sentence


def _checkpoint() -> str:
    try:
        return "".join(f"in {folder} " for folder in dict.fromkeys((get_args().load, get_args().save)) if folder)
    except AssertionError:  # Megatron has no arguments yet
        return ""


def describe(error: BaseException) -> tuple[str, int, BaseException | None]:
    """What to say of an error.

    Returns:
        the sentence; the exit code, 2 for a mistake of the user's; and, where nothing of it is known, the error again,
        whose traceback is to be kept.
    """
    if isinstance(error, nan.NotANumberError):
        return str(error), error.code, None
    if isinstance(error, RuntimeError) and (sentence := nan.refused_unwatched(error)):
        return sentence, outcome.NOT_A_NUMBER, None
    if (sentence := sentence_of(error)) is not None:
        return sentence, outcome.REFUSED, None
    what = f"{type(error).__name__} in {_place(_frames(error)[-1:])}"
    return f"{what}, which is not known to be caused by your input: {' '.join(str(error).split())}", 1, error


@contextmanager
def refusing_flags(args: Namespace) -> Iterator[None]:
    """What Megatron raises while it checks flags becomes a :class:`ConfigError` that names them.

    Args:
        args: the flags as they were given; their names tell flags from other words.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise ConfigError(os_sentence(error) or flag_sentence(error, args)) from error
    except (Exception, SystemExit) as error:  # Megatron ends the program, with 0, where a flag was renamed
        raise ConfigError(flag_sentence(error, args)) from error


def flag_sentence(error: BaseException, args: Namespace) -> str:
    """One sentence: the flags of the statement that failed with their values, Megatron's reason, and its place."""
    frames = [frame for frame in _frames(error) if _package(frame.filename) == "megatron"] or _frames(error)
    asked = [_asked(frame) for frame in reversed(frames)]
    reason = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        reason = "it prints why and ends the program"
    elif not isinstance(error, (AssertionError, ValueError, NotImplementedError, RuntimeError)):
        reason = f"{type(error).__name__}: {reason}"
    if not reason and asked and asked[0]:
        reason = f"it requires that {ast.unparse(asked[0][0])}"
    names = _flags_in_text(reason, args) or next(filter(None, (_flags_in_code(nodes, args) for nodes in asked)), [])
    names = names or [n for n, value in vars(args).items() if isinstance(value, str) and value[3:] and value in reason]
    flags = ", ".join(f"--{name.replace('_', '-')} {_shown(getattr(args, name))}" for name in names[:4])
    if len(reason) > _MOST:
        reason = f"{reason[:_MOST]}..."
    return f"{flags or 'these flags'}: Megatron refuses this: {reason.rstrip('.')} ({_place(frames)})."


def _shown(value: object) -> str:
    return "(not given)" if value is None else repr(value)[:80]


def _frames(error: BaseException) -> list[FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _package(filename: str) -> str | None:
    parts = Path(filename).parts
    return next((part for part in reversed(parts) if part in _PACKAGES), None)


def _place(frames: list[FrameSummary]) -> str:
    if not frames:
        return "an unknown place"
    path = Path(frames[-1].filename)
    package = _package(frames[-1].filename)
    if package is not None:
        path = Path(*path.parts[len(path.parts) - 1 - path.parts[::-1].index(package) :])
    return f"{path}:{frames[-1].lineno}"


def _flags_in_text(text: str, args: Namespace) -> list[str]:
    """Names of flags in a message: ``--num-layers``, or ``num_layers``; a name of one word counts with its dashes."""
    found = []
    for dashes, word in re.findall(r"(--)?([A-Za-z][A-Za-z0-9_-]*)", text):
        name = word.replace("-", "_")
        name = _ALIASES.get(name, name)
        if name in vars(args) and name not in found and (dashes or "_" in name):
            found.append(name)
    return found


def _flags_in_code(nodes: list[ast.AST], args: Namespace) -> list[str]:
    names = [n.attr for node in nodes for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    names = [_ALIASES.get(name, name) for name in names]
    return [name for name in dict.fromkeys(names) if name in vars(args)]


def _asked(frame: FrameSummary) -> list[ast.AST]:
    """What the failing statement asked, and the ``if`` tests around it, innermost first.

    Of an assertion its test, of a ``raise`` nothing of its own, of a loop or a branch its head.
    """
    try:
        tree = _syntax(frame.filename)
    except (OSError, SyntaxError, ValueError):
        return []
    spans = [(n.lineno, -(n.end_lineno or n.lineno), n) for n in ast.walk(tree) if isinstance(n, ast.stmt)]
    line = frame.lineno or 0
    around = [
        n for start, end, n in sorted(spans, key=lambda span: span[:2]) if start <= line <= -end
    ]  # outermost first
    tests: list[ast.AST] = [n.test for n in reversed(around) if isinstance(n, (ast.Assert, ast.If, ast.While))]
    simple = around and not hasattr(around[-1], "body") and not isinstance(around[-1], (ast.Assert, ast.Raise))
    return [around[-1], *tests] if simple else tests


@cache
def _syntax(filename: str) -> ast.Module:
    return ast.parse(Path(filename).read_text(encoding="utf-8"))
