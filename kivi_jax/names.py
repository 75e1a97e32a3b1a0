"""Cache strategies by name, for command lines and configuration strings.

    full        kivi2        kivi4        kivi2:group_size=64:residual_length=32

A name is followed by fields of the function it stands for, separated by colons (no commas or brackets, so
that a name survives shells and comma-separated option lists).
"""

import inspect
from collections.abc import Callable
from functools import partial

from kivi_jax.cache import CacheStrategy, full, kivi

STRATEGIES: dict[str, Callable[..., CacheStrategy]] = {
    "full": full,
    "kivi1": partial(kivi, 1),
    "kivi2": partial(kivi, 2),
    "kivi4": partial(kivi, 4),
    "kivi8": partial(kivi, 8),
}


def parse_cache(text: str) -> CacheStrategy:
    """The strategy that `text` names.

    Raises:
        ValueError: the name or a field is unknown, or a value is not allowed; the message lists what is.
    """
    name, *fields = text.split(":")
    if name not in STRATEGIES:
        raise ValueError(f"unknown cache {name!r}: choose one of {', '.join(STRATEGIES)}")
    build = STRATEGIES[name]
    known = inspect.signature(build).parameters
    options: dict[str, int | str] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals or key not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(
                f"cannot read {field!r} in cache {text!r}: write field=value, fields of {name}: {allowed}"
            )
        options[key] = int(value) if value.lstrip("-").isdigit() else value
    try:
        return build(**options)
    except TypeError as error:
        raise ValueError(f"cannot read cache {text!r}: {error}") from error
