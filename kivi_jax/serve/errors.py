"""What is not answered, and why: OpenAI's error object and the status of HTTP that goes with it."""

from typing import Any

from openai.types.shared import ErrorObject
from pydantic import ValidationError

_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 500: "server_error"}


class Refused(Exception):
    """A request that cannot be answered."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        """Say why, of which field, with which status of HTTP."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def as_error(refused: Refused) -> dict[str, Any]:
    """The body that OpenAI's clients read."""
    kind = _KINDS.get(refused.status, "invalid_request_error")
    error = ErrorObject(message=str(refused), type=kind, param=refused.param, code=refused.code)
    return {"error": error.model_dump(include={"message", "type", "param", "code"})}


def of_fields(error: ValidationError) -> Refused:
    """The first field that is not as the schema has it.

    Where a field may be of several types, what is said is of the type that what was sent fits best.
    """
    first = max(error.errors(include_url=False, include_context=False), key=lambda found: len(found["loc"]))
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    param, reason = ".".join(path), first["msg"][0].lower() + first["msg"][1:]
    return Refused(f"{param}: {reason}, got {first['input']!r:.60}", status=422, param=param)
