"""Train a LLaMA-style SentencePiece BPE tokenizer on a sample of a corpus."""

import sys
from pathlib import Path

from megatron_dynmoe.data.shards import expand_inputs
from megatron_dynmoe.data.tokenizers import train_tokenizer
from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.programs.command import command_parser


@one_sentence("train_tokenizer")
def main(argv: list[str] | None = None) -> int:
    """Parse, train, report; 1 with one sentence on stderr."""
    parser = command_parser(
        __doc__, example="dynmoe-tokenizer --corpus corpus --output tokenizer --vocab-size 8192", defaults=True
    )
    parser.add_argument(
        "--corpus", nargs="+", required=True, help="jsonl shards, globs, or folders (without their held-out shards)"
    )
    parser.add_argument("--output", type=Path, required=True, help="prefix: OUTPUT.model is written")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens, with <unk>, <s>, </s> and the 256 bytes")
    parser.add_argument("--sample-megabytes", type=float, default=8.0, help="text to train on, in million bytes")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already there")
    args = parser.parse_args(argv)
    try:
        shards = expand_inputs(args.corpus)
        print(f"training {args.vocab_size} tokens on {args.sample_megabytes:g} MB of {len(shards)} shards", flush=True)
        model = train_tokenizer(
            shards,
            args.output,
            vocab_size=args.vocab_size,
            sample_megabytes=args.sample_megabytes,
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written.") from None
    print(f"wrote {model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
