"""The one safe reader of checkpoints, without megatron: what a folder holds, as plain data, or a sentence."""

from .check import all_places, check_places, common_state, share
from .errors import CheckpointError, NotPlainError
from .folder import TRACKER, format_of, iterations, latest_folder, notes

__all__ = [
    "TRACKER",
    "CheckpointError",
    "NotPlainError",
    "all_places",
    "check_places",
    "common_state",
    "format_of",
    "iterations",
    "latest_folder",
    "notes",
    "share",
]
