"""What callers pass: counts must be whole, of whatever type, dtypes floats, a model one, and rows short."""

import functools
import logging
import numbers
import operator
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

_log = logging.getLogger(__name__)


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


def instance(name: str, value: Any, kind: type, cure: str) -> None:
    """Refuse what is not of a kind that no other can stand for.

    Raises:
        ValueError: it is of another; `cure` says what to pass.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of type {type(value).__name__}, not {kind.__name__}: {cure}")


def path(name: str, value: Any) -> Path:
    """`value` as a path, where it is one or a text.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={value!r:.60} is no path: pass a text or a Path")
    return Path(value)


def floating(dtype: Any) -> np.dtype[Any]:
    """The dtype that a name or a type means.

    Raises:
        ValueError: it means none, or one that does not hold weights.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{dtype=} must be float32, bfloat16 or float16")
    return found


def warn_beyond(context: int, tokens: int) -> None:
    """Say, once for models of this `context`, that rows of `tokens` are longer."""
    if tokens > context:
        warn_once(
            f"rows may become longer than the {context:,} tokens that the model was made for "
            "(max_position_embeddings): what it says beyond them may mean nothing"
        )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that it is given."""
    _log.warning(message)
