"""Numbers that callers pass: counts must be whole, whatever type they come in."""

import operator
from typing import Any


def whole(name: str, number: Any) -> int:
    """`number` as an int, where it is one: Python's, NumPy's or an array's, but no float.

    Raises:
        ValueError: it is none.
    """
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name}={number!r} must be a whole number") from None
