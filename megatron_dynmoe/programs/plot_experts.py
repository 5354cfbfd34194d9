"""Draw how many experts each layer of a run had, how many its tokens visited, and where experts were added or removed.

Reads what training wrote with --moe-metrics-file; runs without adaptive experts show what they have. See
docs/watching.md.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.programs.command import command_parser
from megatron_dynmoe.report.experts_plot import FORMATS, picture
from megatron_dynmoe.report.experts_table import experts_table
from megatron_dynmoe.report.metrics_file import ReportError, read_run

EXAMPLE = "dynmoe-report experts metrics.jsonl --output experts.png --table changes.md"


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(__doc__, example=EXAMPLE, allow_abbrev=False, prog=prog)
    result.add_argument(
        "metrics", nargs="+", type=Path, metavar="RUN.jsonl", help="files of one run, in the order they were written"
    )
    endings = ", ".join(f".{kind}" for kind in FORMATS)
    result.add_argument("--output", type=Path, required=True, help=f"the picture; ends in one of {endings}")
    result.add_argument("--table", type=Path, help="the changes of experts in Markdown; ends in .md")
    return result


def suffix(path: Path, flag: str, accepted: tuple[str, ...]) -> str:
    """The ending of a file to write, without its dot."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in accepted:
        endings = ", ".join(f".{kind}" for kind in accepted)
        raise ReportError(f"{flag} {path}: the suffix is {path.suffix!r}; accepted: {endings}.")
    return kind


def write(contents: dict[Path, bytes]) -> None:
    """Files, each whole or not at all, and none if one of them cannot be written."""
    besides = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, content in contents.items():
            if path.is_dir():
                raise ReportError(f"{path} is a folder; give the name of a file.")
            path.parent.mkdir(parents=True, exist_ok=True)
            besides[path].write_bytes(content)
        for path, beside in besides.items():
            os.replace(beside, path)
    except OSError as error:
        raise ReportError(f"{error.filename} cannot be written ({error.strerror}).") from None
    finally:
        for beside in besides.values():
            if beside.is_file():
                beside.unlink()


@one_sentence("plot_experts")
def main(argv: list[str] | None = None, *, prog: str | None = None) -> int:
    """Parse, read, draw, write; 1 with one sentence on stderr."""
    args = parser(prog).parse_args(argv)
    kind = suffix(args.output, "--output", FORMATS)
    if args.table is not None:
        suffix(args.table, "--table", ("md",))
    run = read_run(args.metrics)
    others = f" and {len(args.metrics) - 1} more" if len(args.metrics) > 1 else ""
    contents = {args.output: picture(run, title=f"{args.metrics[0]}{others}", kind=kind)}
    if args.table is not None:
        contents[args.table] = experts_table(run).encode()
    write(contents)
    return 0


if __name__ == "__main__":
    sys.exit(main())
