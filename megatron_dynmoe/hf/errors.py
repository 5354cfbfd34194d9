"""What an export refuses."""

from megatron_dynmoe.checkpoint.errors import CheckpointError


class ExportError(CheckpointError):
    """A checkpoint, or a request, that cannot be exported; `str(error)` is one sentence for the user."""
