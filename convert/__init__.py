"""From Hugging Face checkpoints to models, and to and from disk. Read `rules.py` first."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.loading import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name. The first one that is asked for imports JAX and orbax, which takes seconds."""
    loading = importlib.import_module("convert.loading")
    if not hasattr(loading, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(loading, name)
