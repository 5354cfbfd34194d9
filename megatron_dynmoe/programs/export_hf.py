"""Export a megatron distributed checkpoint (any layout) to a Hugging Face folder. Needs no GPU and no megatron."""

import sys
from pathlib import Path

from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.plugins import load_plugins
from megatron_dynmoe.programs.command import add_plugin_flag, command_parser, sigterm_like_ctrl_c

DTYPES = ("float32", "bfloat16", "float16")  # those of hf.export, which takes a second to import
EXAMPLE = "dynmoe-export --checkpoint SAVE --output exported --tokenizer-model tokenizer.model"


def write_tokenizer(model: Path, folder: Path) -> None:
    """Write a SentencePiece model, or a `tokenizer.json`, as the tokenizer of `folder`."""
    if model.suffix == ".json":
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(tokenizer_file=str(model)).save_pretrained(folder)
        return
    from megatron_dynmoe.data.hf_tokenizer import to_hf_tokenizer

    to_hf_tokenizer(model, folder)


@one_sentence("export_hf")
@sigterm_like_ctrl_c
def main(argv: list[str] | None = None) -> int:
    """Parse, export, report; 0 on success, 1 with one sentence on stderr."""
    parser = command_parser(__doc__, example=EXAMPLE)
    parser.add_argument("--checkpoint", required=True, type=Path, help="SAVE (newest iteration) or SAVE/iter_0000100")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer of the training, exported with the model")
    parser.add_argument("--iteration", type=int, help="iteration of SAVE to export (default: the newest)")
    parser.add_argument("--vocab-size", type=int, help="tokens of the vocabulary (default: the tokenizer's)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored; routers are float32 always")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it is not empty")
    add_plugin_flag(parser)
    args = parser.parse_args(argv)
    from megatron_dynmoe.hf.export import export

    load_plugins(args.moe_plugin)

    try:
        done = export(
            args.checkpoint,
            args.output,
            iteration=args.iteration,
            tokenizer_model=args.tokenizer_model,
            write_tokenizer=write_tokenizer,
            vocab_size=args.vocab_size,
            dtype=args.dtype,
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{args.output} is as it was.") from None
    print(
        f"{done.checkpoint} -> {done.path}: {done.parameters / 1e6:.1f}M parameters, {done.bytes / 1e6:.0f} MB "
        f"in {done.shards} shard(s), vocabulary of {done.vocab_size}"
    )
    if done.left_out:
        print(
            f"left out: the layers of multi-token prediction, {len(done.left_out)} tensors from {done.left_out[0]} to "
            f"{done.left_out[-1]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
