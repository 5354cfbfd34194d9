"""Import an exported Hugging Face folder as a distributed checkpoint that training continues from, in any layout.

Needs no GPU and no megatron. Nothing in the folder is unpickled or run.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.programs.command import command_parser, sigterm_like_ctrl_c

if TYPE_CHECKING:
    from megatron_dynmoe.hf.importing import Imported

DTYPES = ("float32", "bfloat16", "float16")  # those of hf.export, which takes a second to import
EXAMPLE = """\
dynmoe-import --model exported --output imported
dynmoe-pretrain --pretrained-checkpoint imported --load RUN --save RUN ..."""


@one_sentence("import_hf", code=2)
@sigterm_like_ctrl_c
def main(argv: list[str] | None = None) -> int:
    """Parse, import, report; 0 on success, 2 with one sentence on stderr."""
    parser = command_parser(__doc__, example=EXAMPLE)
    parser.add_argument("--model", required=True, type=Path, help="folder that dynmoe-export wrote")
    parser.add_argument("--output", required=True, type=Path, help="checkpoint folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored; routers are float32 always")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="as the training will have it; rows of padding are zeros (default: 128, megatron's)",
    )
    parser.add_argument(
        "--moe-max-added-experts",
        type=int,
        default=1,
        metavar="N",
        help="as the training will have it, where the number of experts adapts (default: 1)",
    )
    args = parser.parse_args(argv)
    from megatron_dynmoe.hf.importing import import_model

    try:
        done = import_model(
            args.model,
            args.output,
            dtype=args.dtype,
            divisible_by=args.make_vocab_size_divisible_by,
            max_added_experts=args.moe_max_added_experts,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{args.output} is as it was.") from None
    _report(done)
    return 0


def _report(done: "Imported") -> None:
    print(
        f"{done.source} -> {done.path}: {done.parameters / 1e6:.1f}M parameters, {done.bytes / 1e6:.0f} MB "
        f"from {done.shards} shard(s)"
    )
    for sentence in done.new:
        print(f"new: {sentence}")
    folder = shlex.quote(str(done.path))
    print(
        "new: optimizer, learning-rate schedule, iteration 0 and random numbers; none of them is in an export\n"
        f"Begin with:  --pretrained-checkpoint {folder} --load RUN --save RUN\n"
        "    The same command goes on from RUN after a restart. With --load of this folder alone, and neither\n"
        "    --finetune nor --no-load-optim, a run also begins at iteration 0, but again after each restart.\n"
        f"The model:   {shlex.join(done.flags)}"
    )


if __name__ == "__main__":
    sys.exit(main())
