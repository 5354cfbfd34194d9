"""SIGTERM where Megatron does not look for it.

Megatron notes the signal and looks at its note once an iteration, on all ranks together. torchrun kills 30 s after it
has passed the signal on, so whatever takes longer is lost: evaluation, and building datasets.

Evaluation has one place where its ranks agree to leave: after each of its steps, if there is a limit on the duration of
training, they ask each other whether it is reached (``training.py``, ``evaluate``). A limit that is never reached makes
them ask; on a rank that has the signal it becomes one that is. Training then goes on to its own look at the signal,
saves and exits.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.training import get_args
from megatron.training.global_vars import get_signal_handler

NEVER, NOW = math.inf, 1e-9  # minutes of training


def signalled(args: Namespace) -> bool:
    """Whether this rank has got the signal that ends training."""
    return bool(args.exit_signal_handler and get_signal_handler()._signal_received)


def before_step(training: bool) -> None:
    """Call it before each forward step: in evaluation it asks all ranks to leave once the signal has come."""
    args = get_args()
    if training:
        if args.exit_duration_in_mins == NEVER:
            args.exit_duration_in_mins = None
        return
    if not args.exit_duration_in_mins:
        args.exit_duration_in_mins = NEVER
    if signalled(args):
        args.exit_duration_in_mins = NOW


def was_cut_short(error: AssertionError) -> bool:
    """Whether ``error`` is all that came of leaving the evaluation after training.

    ``evaluate`` leaves its timer running when it leaves early, which the evaluation of the test set then stumbles over,
    on all ranks alike.
    """
    return str(error) == "timer has already been started" and get_args().exit_duration_in_mins in (NEVER, NOW)


def ends_at_once(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build``, during which SIGTERM ends the process: there is nothing to save yet.

    The signal's own action, not a Python function, which would wait for the compiled loops that build an index.
    """

    @wraps(build)
    def build_or_end(*args: Any, **kwargs: Any) -> Any:
        if signalled(get_args()):
            print("SIGTERM came before training started; nothing to save.", file=sys.stderr, flush=True)
            os._exit(128 + get_args().exit_signal)
        handler = signal.signal(get_args().exit_signal, signal.SIG_DFL)
        try:
            return build(*args, **kwargs)
        finally:
            signal.signal(get_args().exit_signal, handler)

    return build_or_end
