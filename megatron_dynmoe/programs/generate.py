"""Continue prompts with an exported model: greedily, or sampled from a seed."""

import argparse
import math
import sys
from pathlib import Path

from megatron_dynmoe.errors import UserError, one_sentence
from megatron_dynmoe.programs.command import command_parser


@one_sentence("generate")
def main(argv: list[str] | None = None) -> int:
    """Parse, load, generate, print; 1 with one sentence on stderr if the folder or a prompt cannot serve."""
    args = _parse(argv)
    for name in ("config.json", "tokenizer.json"):
        if not (args.model / name).is_file():
            raise UserError(f"{args.model / name} is missing; give a folder exported with its tokenizer.")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The tokenizer runs no code of the folder, but transformers reads config.json first and would ask.
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).to(device).eval()
    how = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    for number, prompt in enumerate(args.prompt):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        if inputs["input_ids"].shape[1] == 0:
            raise UserError("the prompt has no tokens; give at least one character.")
        set_seed(args.seed)  # before each, so that a prompt's text does not depend on its place
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, **how)
        if number:
            print("\n---")
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(
        __doc__, example='dynmoe-generate --model exported --prompt "The state of the art"', defaults=True
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, help="folder written by dynmoe-export")
    add("--prompt", required=True, nargs="+", help="texts to continue")
    add("--max-new-tokens", type=int, default=64, help="at most so many tokens after each prompt")
    add("--temperature", type=float, default=0.0, help="0: greedy; above: sample, 1 from the model's own probabilities")
    add("--seed", type=int, default=1234, help="of the sampling: the same seed gives the same text")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; accepted: at least 1")
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature is {args.temperature}; accepted: 0 or a positive number")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed is {args.seed}; accepted: 0 to {2**32 - 1}")
    return args


if __name__ == "__main__":
    sys.exit(main())
