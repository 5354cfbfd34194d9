"""What is wrong with a checkpoint, as one sentence."""

from megatron_dynmoe.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that is not loaded; the message names the file and what is wrong with it."""


class NotPlainError(CheckpointError):
    """A pickle that names something else than plain data; the message says what."""
