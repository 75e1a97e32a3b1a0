"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that says what was found and what to do."""


def brief(error: Exception) -> str:
    """The first line of an error's text, without the specification that tensorstore appends to its own."""
    return str(error).splitlines()[0].partition(" [tensorstore_spec")[0]
