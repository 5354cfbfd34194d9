"""The one exception of this room: its message is the sentence a user reads."""


class DataError(ValueError):
    """Input or output that cannot be used; ``str(error)`` is one sentence that names it and what would be accepted."""
