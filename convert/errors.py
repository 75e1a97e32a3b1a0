"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that says what was found and what to do."""
