"""Collect real text from this machine (Python's library and the installed packages) as RedPajama-style jsonl shards."""

import sys
from pathlib import Path

from megatron_dynmoe.data.corpus import HELD_OUT, SUBSETS, TRAIN, collect
from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.programs.command import command_parser


@one_sentence("collect_corpus")
def main(argv: list[str] | None = None) -> int:
    """Parse, collect, report; 1 with one sentence on stderr."""
    parser = command_parser(__doc__, example="dynmoe-corpus --output corpus --megabytes 24", defaults=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write: {code,docs}/{train,heldout}-*.jsonl"
    )
    parser.add_argument(
        "--megabytes", type=float, default=24.0, help="limit of training text of each subset, in million bytes"
    )
    parser.add_argument("--heldout-percent", type=float, default=1.0, help="part of the documents kept out of training")
    parser.add_argument("--shard-megabytes", type=float, default=4.0, help="size at which the next shard is begun")
    parser.add_argument("--zstd", nargs="*", default=[], choices=SUBSETS, help="subsets to write as .jsonl.zst")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is already there")
    args = parser.parse_args(argv)
    try:
        manifest = collect(
            args.output,
            megabytes=args.megabytes,
            heldout_percent=args.heldout_percent,
            shard_megabytes=args.shard_megabytes,
            compressed=tuple(args.zstd),
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written.") from None
    for subset, splits in manifest["subsets"].items():
        for split in (TRAIN, HELD_OUT):
            counts = splits[split]
            size = f"{counts['text_bytes'] / 1e6:.1f} MB in {len(counts['shards'])} shards"
            print(f"{args.output}/{subset}/{split}-*: {counts['documents']} documents, {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
