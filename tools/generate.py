#!/usr/bin/env python
"""Continue a prompt with an exported model, greedily."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse, load, generate, print; 1 with one sentence on stderr if the folder cannot serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder written by export_hf.py")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    for name in ("config.json", "tokenizer.json"):
        if not (args.model / name).is_file():
            print(
                f"generate: {args.model / name} is missing; give a folder exported with its tokenizer.", file=sys.stderr
            )
            return 1

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The tokenizer runs no code of the folder, but transformers reads config.json first and would ask.
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).to(device).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    if inputs["input_ids"].shape[1] == 0:
        print("generate: the prompt has no tokens; give at least one character.", file=sys.stderr)
        return 1
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
