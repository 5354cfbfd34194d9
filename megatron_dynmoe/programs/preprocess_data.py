"""Encode jsonl shards (plain, .gz, .zst) into Megatron's indexed datasets.

Give --input and --output-prefix once for each dataset; several in one command share the seconds that importing
Megatron takes.
"""

import argparse
import os
import sys
import time

from megatron_dynmoe.data.preprocess import preprocess
from megatron_dynmoe.data.tokenizers import TokenizerFile
from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.programs.command import command_parser

EXAMPLE = """\
dynmoe-preprocess --tokenizer-model tokenizer.model --append-eod \\
    --input corpus/code --output-prefix data/code --input corpus/docs --output-prefix data/docs"""


@one_sentence("preprocess_data")
def main(argv: list[str] | None = None) -> int:
    """Parse, encode, report each dataset; 1 with one sentence on stderr."""
    args = _parse(argv)
    done: list[str] = []
    try:
        tokenizer = TokenizerFile.find(args.tokenizer_model, args.tokenizer_type)
        for inputs, prefix in zip(args.input, args.output_prefix, strict=True):
            begin = time.perf_counter()
            summary = preprocess(
                inputs,
                prefix,
                tokenizer=tokenizer,
                json_key=args.json_key,
                append_eod=args.append_eod,
                workers=args.workers,
                max_bad_lines=args.max_bad_lines,
                overwrite=args.overwrite,
            )
            seconds = time.perf_counter() - begin
            print(
                f"{prefix}: {summary.documents} documents, {summary.tokens} tokens ({summary.dtype}) of"
                f" {summary.text_bytes / 1e6:.1f} MB text, {summary.bad_lines} bad lines left out;"
                f" {seconds:.1f} s, {summary.text_bytes / 1e6 / seconds:.1f} MB/s",
                flush=True,
            )
            done.append(prefix)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{', '.join(done) or 'nothing'} was written.") from None
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, example=EXAMPLE)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="append",
        required=True,
        help="files, globs, or folders (without their heldout-* shards)",
    )
    add("--output-prefix", action="append", required=True, help="PREFIX.bin, PREFIX.idx and PREFIX.json are written")
    add("--tokenizer-model", required=True, help="SentencePiece .model, or Hugging Face tokenizer.json or its folder")
    add(
        "--tokenizer-type",
        choices=["auto", "sentencepiece", "huggingface"],
        default="auto",
        help="auto: by the file's extension",
    )
    add("--json-key", default="text", help="field that holds the text (default: text)")
    add("--append-eod", action="store_true", help="end every document with the tokenizer's end-of-document token")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    add(
        "--max-bad-lines",
        type=int,
        help="fail beyond so many unusable lines (default: leave them out, report and count them)",
    )
    add("--overwrite", action="store_true", help="replace datasets that are already there")
    args = parser.parse_args(argv)
    if len(args.input) != len(args.output_prefix):
        parser.error(
            f"--input is given {len(args.input)} times and --output-prefix {len(args.output_prefix)};"
            " each needs the other"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())
