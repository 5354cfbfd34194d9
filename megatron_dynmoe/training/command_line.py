"""The command line, read and checked before anything is started: what cannot work is refused in one sentence."""

from __future__ import annotations

import re
import sys
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from functools import cache
from typing import Any, NoReturn

from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args

from megatron_dynmoe import host
from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.host.device import claim_queues
from megatron_dynmoe.plugins import load_plugins, named_in
from megatron_dynmoe.routers import GATES, RULES
from megatron_dynmoe.training import resume
from megatron_dynmoe.training.arguments import add_dynmoe_args, dynmoe_from_args, prepare_argv
from megatron_dynmoe.training.failures import refusing_flags
from megatron_dynmoe.training.paths import check_paths
from megatron_dynmoe.training.refused import check_flags
from megatron_dynmoe.training.values import check_ranks, check_values

# Megatron evaluates such flags as Python ([0]*3+[1]); `9**9**9` would never end.
_PATTERN = re.compile(r"\*\*|\d{7}")
_EVALUATED = ("moe_layer_freq", "linear_attention_freq", "no_rope_freq", "window_attn_skip_freq")


class FlagParser(ArgumentParser):
    """Megatron's flags and ours; a mistake is a :class:`ConfigError`, not a usage text of 800 flags."""

    def __init__(self) -> None:
        super().__init__(prog="pretrain_dynmoe.py", allow_abbrev=False)
        add_dynmoe_args(add_megatron_arguments(self))
        self.description = "Pretrain a dynamic MoE language model: Megatron's flags, and ours under 'dynamic MoE'."
        for action in self._actions:
            self._mend_help(action)

    def _mend_help(self, action: Action) -> None:
        """A bare ``%`` of upstream's ends argparse's formatting of the whole help."""
        try:
            self._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%%", "%").replace("%", "%%")

    def _get_value(self, action: Action, text: str) -> Any:
        """argparse's conversion of one word; whatever Megatron's converters raise is the user's mistake."""
        if action.dest in _EVALUATED and _PATTERN.search(text):
            raise ArgumentError(action, f"{text[:80]!r} is too large a pattern")
        try:
            return super()._get_value(action, text)
        except ArgumentError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ArgumentError(action, f"invalid value {text[:80]!r} ({reason})") from error

    def error(self, message: str) -> NoReturn:
        """argparse's complaint as a :class:`ConfigError`."""
        message = " ".join(message.split())
        if len(message) > 600:
            message = f"{message[:600]}..."
        raise ConfigError(f"{message}; --help-all shows all flags.")


@cache
def _parser(methods: tuple[str, ...]) -> FlagParser:
    """One for each set of registered methods, whose flags it has."""
    return FlagParser()


def read_flags(argv: list[str]) -> tuple[Namespace, DynMoEConfig, resume.Resume | None]:
    """Parse and check the command line, ours before Megatron's own checks; sets Megatron's global arguments.

    Args:
        argv: the command line without the program's name; ``sys.argv`` becomes what Megatron reads.

    Raises:
        ConfigError: what cannot work, with the flag, its value, and what would be accepted.
        CheckpointError: what ``--load`` names is not plain data, or damaged.
    """
    load_plugins(named_in(argv))
    argv = [*host.default_flags(), *prepare_argv(argv)]
    given = _parser((*GATES, *RULES)).parse_args(argv)
    check_flags(given)
    check_values(given)
    if host.backend() == "gloo":
        claim_queues(one=not given.use_megatron_fsdp)
    dynmoe = dynmoe_from_args(given)
    resumed = resume.prepare(given)  # before anything of a checkpoint is unpickled, which Megatron's checks may do
    sys.argv[1:] = argv
    with refusing_flags(given):
        args = parse_and_validate_args(add_dynmoe_args)
    check_ranks(args)
    check_paths(args)
    return args, dynmoe, resumed
