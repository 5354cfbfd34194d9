"""What the user can mend is said in one sentence; everything else is a fault and keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

Main = Callable[..., int]  # of a program: the words after its name, its own where they are left out, to its exit code

# What the machine or the user's paths say, by the operating system's own words.
_OF_THE_USER = {
    getattr(errno, name)
    for name in "EACCES EPERM EROFS ENOENT EEXIST ENOTDIR EISDIR ENOTEMPTY ENAMETOOLONG ENOSPC EDQUOT EFBIG ELOOP "
    "ENXIO EMFILE ENFILE EIO ESTALE ENODEV EINVAL".split()
}
# Without a path these are about memory, sockets or pipes; a full disk is a full disk.
_WITHOUT_PATH = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}


class UserError(ValueError):
    """Something that the user gave and can change: ``str(error)`` is the sentence that says what and how."""


class ConfigError(UserError):
    """A value that cannot work; the message names the field, the value and what would be accepted."""


def one_sentence(program: str, *, code: int = 1) -> Callable[[Main], Main]:
    """A program's ``main`` that ends with one sentence on stderr where the user can mend it, and exit code ``code``.

    Ctrl-C is 130; what it left behind, a program says as the text of the KeyboardInterrupt.  Faults keep their
    traceback.

    Args:
        program: stands before the sentence.
    """

    def decorate(main: Main) -> Main:
        @wraps(main)
        def told(*argv: Any, **how: Any) -> int:
            try:
                return main(*argv, **how)
            except (UserError, OSError) as error:
                if (sentence := user_sentence(error)) is None:
                    raise
                print(f"{program}: {sentence}", file=sys.stderr)
                return code
            except KeyboardInterrupt as stop:
                print(f"{program}: interrupted; {stop}" if str(stop) else f"{program}: interrupted", file=sys.stderr)
                return 130

        return told

    return decorate


def user_sentence(error: BaseException) -> str | None:
    """The sentence of a :class:`UserError` or of an :class:`OSError` about a file; ``None`` for everything else."""
    if isinstance(error, UserError):
        return str(error)
    return os_sentence(error) if isinstance(error, OSError) else None


def os_sentence(error: OSError) -> str | None:
    """One sentence with the path for an operating system's refusal; ``None`` where it is not about the user's files.

    A missing file of Python's own installation, a lost connection or a broken pipe are no mistake of the user.
    """
    if error.errno is None or error.errno not in _OF_THE_USER:
        return None
    reason = os.strerror(error.errno)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, Path))]
    if not names:
        return f"{reason}." if error.errno in _WITHOUT_PATH else None
    installed = (sys.prefix, sys.base_prefix)
    if error.errno == errno.ENOENT and any(Path(names[0]).is_relative_to(place) for place in installed):
        return None
    return f"{_short(names[0])}: {reason}{''.join(f' ({_short(name)})' for name in names[1:])}."


def _short(name: str) -> str:
    """A path that is shown: one line, its end cut where it is longer than any file system takes."""
    line = name.encode("unicode_escape").decode() if not name.isprintable() else name
    return line if len(line) <= 300 else f"{line[:300]}... ({len(line)} characters)"
