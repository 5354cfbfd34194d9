"""The command lines of examples/pretrain.sh, for any number of GPUs and with flags of one's own, all from one shell.

The script is read and run as it is, but for its last line: what it would start is written down instead.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = sorted(file.stem for file in (EXAMPLES / "models").glob("*.args"))

# A line is a command: GPUs, nodes, implementation, model, flags. The answer: what the script would start, or a refusal.
_ASK = r"""
exec() { printf '%s\037' "queues=${CUDA_DEVICE_MAX_CONNECTIONS:-}" "$@"; }
while read -r gpus nodes impl words; do
    (GPUS=$gpus NNODES=$nodes TRANSFORMER_IMPL=$impl; set -- $words; source "$script") 2>&1
    printf '\036'
done
"""


@dataclass(frozen=True)
class Command:
    """How pretrain.sh is called, and, from :func:`written`, what it would start."""

    model: str
    world: int = 8
    impl: str = "transformer_engine"
    flags: tuple[str, ...] = ()
    apex: bool = False
    words: tuple[str, ...] = ()
    queues: str = ""

    def __str__(self) -> str:
        apex = ", apex" if self.apex else ""
        return f"{self.model} on {self.world} GPUs, {self.impl}{apex}: {' '.join(self.flags)}"


def written(commands: list[Command], folder: Path) -> list[Command]:
    """The commands with the words of the training entry that the script makes of each."""
    (folder / "text.idx").touch()
    (folder / "tokenizer.model").touch()
    asked = [f"8 {c.world // 8} {c.impl} {c.model} {' '.join(c.flags)}" for c in commands]
    given = {"DATA": str(folder / "text"), "TOKENIZER": str(folder / "tokenizer.model"), "SAVE": str(folder / "save")}
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_DEVICE_MAX_CONNECTIONS"}
    environment |= given | {"script": str(EXAMPLES / "pretrain.sh"), "TORCHRUN": "torchrun"}
    run = subprocess.run(
        ["bash", "-c", _ASK],
        input="\n".join(asked) + "\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = run.stdout.split("\036")
    assert len(answers) == len(commands) + 1, run.stderr
    return [_with_words(command, answer) for command, answer in zip(commands, answers, strict=False)]


def _with_words(command: Command, answer: str) -> Command:
    queues, *words = answer.split("\037")
    entry = [place for place, word in enumerate(words) if word.endswith("pretrain_dynmoe.py")]
    assert len(entry) == 1, f"{command}: {answer}"
    return replace(command, words=tuple(words[entry[0] + 1 : -1]), queues=queues.removeprefix("queues="))
