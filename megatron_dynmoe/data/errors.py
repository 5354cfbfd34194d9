"""The one exception of this room: its message is the sentence a user reads."""

from megatron_dynmoe.errors import UserError


class DataError(UserError):
    """Input or output that cannot be used; ``str(error)`` is one sentence that names it and what would be accepted."""
