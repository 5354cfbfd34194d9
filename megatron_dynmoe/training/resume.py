"""Before megatron sees a checkpoint: which one, whether it is plain data and whole.

Each rank looks at its share of the files. What one of them finds, all of them learn through the rendezvous' store
before any goes on, so nothing is unpickled that another rank has not looked at yet.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dynmoe import checkpoint
from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.checkpoint.lock import WAIT_S, hold
from megatron_dynmoe.errors import UserError, user_sentence

# The store lives as long as this: rank 0 serves it, and megatron's own rendezvous takes it over.
_store: Any = None


@dataclass(frozen=True)
class Resume:
    """What will be loaded.

    Attributes:
        folder: of one iteration.
        state: what the checkpoint holds beside tensors, as plain data; `None` where it says nothing of itself.
    """

    folder: Path
    state: dict[str, Any] | None


def add_resume_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags about loading checkpoints."""
    group = parser.add_argument_group(title="dynamic MoE: resume")
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="Load a checkpoint whatever it names when it is unpickled, which can run any code. For your own alone.",
    )
    group.add_argument(
        "--no-moe-verify-checkpoint",
        action="store_false",
        dest="moe_verify_checkpoint",
        help="Do not hold all bytes of a checkpoint against their checksums before it is loaded.",
    )
    group.add_argument(
        "--moe-allow-routing-change",
        action="store_true",
        help="Resume although what the model computes (routing, positions, norms) differs from the checkpoint's.",
    )
    return parser


def prepare(args: Namespace) -> Resume | None:
    """Take the lock of ``--save``, look at what ``--load`` means, and tell the other ranks.

    Call it with parsed arguments, before megatron's own validation, which may load the checkpoint's arguments already.

    Raises:
        CheckpointError: on every rank, with what the first rank found.
        OSError: a folder that cannot be read or written.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.fake_process_group:
        rank, ranks = 0, 1
    found, error = None, None
    try:
        if args.save and rank == 0 and (waited := hold(Path(args.save), wait_s=WAIT_S)):
            note(waited)
        found = _look(args, rank, ranks)
    except (UserError, OSError) as failure:
        if ranks == 1:
            raise
        error = user_sentence(failure) or str(failure)
    if ranks > 1 and (args.save or _roots(args)):
        _agree(args, rank, ranks, str(found and found.folder), error)
    if found is not None and not args.trust_checkpoint:
        # Torch asks this even where the caller said weights_only=False, as its checkpoint planner does.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None):  # torch refuses to have both
            note("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is not heeded; --trust-checkpoint says the same.")
    if found is not None:
        # Transformer Engine refuses its own delayed scales otherwise, as they are pickled (pytorch/_extra_state.py:96).
        # Here they are plain data, which was looked at above, or trusted.
        os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
    return found


def _roots(args: Namespace) -> list[Path]:
    """Where megatron looks for a checkpoint, in its order (checkpointing.py:2099, 1650)."""
    load = Path(args.load) if args.load else None
    if args.pretrained_checkpoint and not (load and (load / checkpoint.TRACKER).is_file()):
        return [Path(args.pretrained_checkpoint)]
    roots = [load] if load else []
    if args.non_persistent_ckpt_type == "global":
        extra = args.non_persistent_global_ckpt_dir or (load and load / "non_persistent")
        roots += [Path(extra)] if extra else []
    return roots


def _look(args: Namespace, rank: int, ranks: int) -> Resume | None:
    if args.non_persistent_ckpt_type == "local" and not args.trust_checkpoint:
        raise CheckpointError(
            "--non-persistent-ckpt-type local unpickles files that are not looked at here; accepted: 'global', or "
            "--trust-checkpoint."
        )
    newest = None
    for root in _roots(args):
        folder = checkpoint.latest_folder(root, args.ckpt_step if root == _first(args) else None)
        if rank == 0:
            for sentence in checkpoint.notes(root, folder):
                note(sentence)
        if folder is not None:
            newest = (
                _look_at(folder, args, rank, ranks)
                if newest is None
                else _newer(newest, _look_at(folder, args, rank, ranks))
            )
    return newest


def _first(args: Namespace) -> Path:
    return _roots(args)[0]


def _newer(one: Resume, other: Resume) -> Resume:
    return max(one, other, key=lambda resume: (resume.state or {}).get("iteration", 0))


def _look_at(folder: Path, args: Namespace, rank: int, ranks: int) -> Resume:
    kind = checkpoint.format_of(folder)
    if kind == "torch_dcp" and args.ckpt_format not in ("torch_dcp", "fsdp_dtensor"):
        raise CheckpointError(
            f"{folder} has an index but no metadata.json: its save was interrupted. Choose another with --ckpt-step."
        )
    if args.trust_checkpoint:
        note(f"{folder} is loaded on trust: neither its content, its checksums nor its arguments are looked at.")
        return Resume(folder, None)
    start = time.monotonic()
    places = checkpoint.all_places(folder, kind)
    state = checkpoint.common_state(folder, places)
    mine = checkpoint.share(places, rank, ranks)
    checkpoint.check_places(folder, mine, checksums=args.moe_verify_checkpoint)
    _check_iteration(folder, state)
    if rank == 0:
        what = "checked" if args.moe_verify_checkpoint else "looked at without checksums"
        size, seconds = sum(place.length for place in mine) / 1e9, time.monotonic() - start
        print(f" [checkpoint] {folder} {what}: {size:.2f} GB on this rank in {seconds:.1f} s", flush=True)
    return Resume(folder, state)


def _check_iteration(folder: Path, state: dict[str, Any] | None) -> None:
    saved = None if state is None else state.get("iteration")
    if folder.name.startswith("iter_") and isinstance(saved, int) and folder.name != f"iter_{saved:07d}":
        raise CheckpointError(f"{folder} holds iteration {saved}; the folder was renamed, or is a copy of another.")


def _agree(args: Namespace, rank: int, ranks: int, folder: str, error: str | None) -> None:
    """Wait for every rank's look; a failure of one is every rank's, at once.

    Raises:
        CheckpointError: a rank failed, or found another folder than rank 0, or did not come back.
    """
    global _store
    if _store is None:
        limit = timedelta(minutes=args.distributed_timeout_minutes)
        _store, *_ = next(iter(dist.rendezvous("env://", rank, ranks, timeout=limit)))
    # torchrun may keep one store over its restarts; what the ranks found before a restart says nothing of this one
    store = dist.PrefixStore(f"resume/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _store)
    where = f"rank {rank} on {socket.gethostname()}"
    store.set(f"{rank}", json.dumps([where, folder]))
    if error is not None:
        store.set("end", f"{where}: {error}" if ranks > 1 else error)
    elif store.add("looked", 1) == ranks:
        store.set("end", "")
    try:
        end = store.get("end").decode()
    except (RuntimeError, ValueError):
        raise CheckpointError(
            f"other ranks did not finish looking at the checkpoint within {args.distributed_timeout_minutes} minutes "
            "(--distributed-timeout-minutes); with --no-moe-verify-checkpoint they read less."
        ) from None
    if end:
        raise CheckpointError(end)
    first, other = json.loads(store.get("0"))
    if other != folder:
        raise CheckpointError(f"{where} would load {folder}, {first} {other}; all hosts must see the same --load.")


def note(sentence: str) -> None:
    """Say it once, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr, flush=True)
