"""What ``--moe-metrics-file`` wrote, for all who read such a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dynmoe.errors import UserError

WANTED = "give a file that --moe-metrics-file wrote"


def training_records(path: Path, error: type[UserError]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of training, in order, each with its place in words; those of evaluations are passed over.

    Args:
        error: of the room that asks.

    Raises:
        UserError: an ``error`` that names the file and the line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    record = _record(line, where, error)
                    if not {"validation_loss", "test_loss"} & record.keys():
                        yield where, record
    except OSError as failure:
        raise error(f"{path} cannot be read ({failure.strerror}); {WANTED}.") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not text; {WANTED}.") from None


def _record(line: str, where: str, error: type[UserError]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise error(f"{where}, is not a JSON object; {WANTED}.")
    return record
