"""What a rank tells the supervisor of its node about its end: torchrun's own exit code is 1, whatever happened.

A file, named by the environment; the first rank of the node that writes it wins.
"""

import contextlib
import json
import os
from pathlib import Path

VARIABLE = "MEGATRON_DYNMOE_OUTCOME_FILE"

REFUSED = 2
"""The input, the flags or the data cannot work."""
NOT_A_NUMBER = 17
"""NaN or Inf from the same batch twice; Megatron's own exit code for a result that fails validation."""
FINAL = {REFUSED, NOT_A_NUMBER}
"""Exit codes that a restart would only repeat."""


def write(code: int, sentence: str) -> None:
    """Leave exit code and sentence for the supervisor, if there is one."""
    if VARIABLE in os.environ:
        with contextlib.suppress(OSError), Path(os.environ[VARIABLE]).open("x", encoding="utf-8") as file:
            json.dump({"code": code, "sentence": sentence}, file)


def read(path: Path) -> tuple[int, str] | None:
    """Exit code and sentence of the node's first rank that failed, None if no rank left any."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return int(said["code"]), str(said["sentence"])
    except (OSError, ValueError, KeyError):
        return None
