"""Reports of a run and of a model.

  experts   a picture of the experts of each layer over a run, from its --moe-metrics-file (needs the extra 'plots')
  tokens    a page that shades each token of a text by the experts it used

``dynmoe-report experts --help`` says the rest.
"""

import sys
from importlib import import_module

from megatron_dynmoe.programs.command import command_parser

REPORTS = {"experts": "plot_experts", "tokens": "token_report"}
EXAMPLE = """\
dynmoe-report experts metrics.jsonl --output experts.png
dynmoe-report tokens --model exported --text "The state of the art" --output report.html"""


def main(argv: list[str] | None = None) -> int:
    """Hand the command line to the report that it names; returns that program's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = command_parser((__doc__ or "").replace("``", "`"), example=EXAMPLE, allow_abbrev=False)
    parser.add_argument("report", choices=REPORTS, help="followed by its own flags")
    report = parser.parse_args(words[:1]).report
    return import_module(f"megatron_dynmoe.programs.{REPORTS[report]}").main(words[1:], prog=f"{parser.prog} {report}")


if __name__ == "__main__":
    sys.exit(main())
