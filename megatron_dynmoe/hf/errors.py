"""What an export and an import refuse."""

from megatron_dynmoe.checkpoint.errors import CheckpointError


class ExportError(CheckpointError):
    """A checkpoint, or a request, that cannot be exported; `str(error)` is one sentence for the user."""


class HFImportError(CheckpointError):
    """A folder, or a request, that cannot be imported; `str(error)` is one sentence for the user."""
