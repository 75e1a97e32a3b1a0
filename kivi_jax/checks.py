"""Numbers that callers pass: counts must be whole, whatever type they come in."""

import numbers
import operator
from typing import Any


def whole(name: str, number: Any) -> int:
    """`number` as an int, where it is one: Python's, NumPy's or an array's, but no float and no truth value.

    Raises:
        ValueError: it is none, or more than positions, which are 32-bit numbers, can count.
    """
    try:
        count = operator.index(number)
    except TypeError:
        count = None
    if count is None or isinstance(number, bool):
        raise ValueError(f"{name}={number!r} must be a whole number")
    if abs(count) >= 2**31:
        raise ValueError(f"{name}={number!r} must be below 2**31: positions are 32-bit numbers")
    return count


def real(name: str, number: Any) -> float:
    """`number` as a float, where it is a number: Python's or NumPy's, but no text and no truth value.

    Raises:
        ValueError: it is none.
    """
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ValueError(f"{name}={number!r} must be a number")
    return float(number)
