"""One step of ``make gpu-check``, or one training of a step, in this process: see ``benchmarks/gpu_check.py``."""

import argparse
import importlib
import os
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """``STEP --out DIR --seconds N [--cpu]``, or ``pretrain`` and the flags of a training."""
    preload = os.environ.get("GPU_CHECK_PRELOAD")
    if preload:
        importlib.import_module(preload)
    if argv[:1] == ["pretrain"]:
        sys.argv[1:] = argv[1:]
        from megatron_dynmoe.programs import pretrain

        return pretrain.main()
    from benchmarks.gpu.step import STEPS, Context, run_step

    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(argv)
    context = Context(name=options.step, out=options.out, cpu=options.cpu, seconds=options.seconds)
    return 1 if run_step(STEPS[options.step], context)["state"] == "failed" else 0


# A checkpoint's helper processes import this file again, under another name.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
