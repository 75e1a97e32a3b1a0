"""KIVI and SCOPE key/value caches for Llama-like models in JAX.

import kivi_jax as kj
model, tokenizer = kj.load("path/to/checkpoint")
texts = kj.complete(model, tokenizer, ["Once upon a time"], cache=kj.kivi(bits=2), max_new_tokens=64)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kivi_jax.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A public name. The first one that is asked for imports all, and JAX, which takes seconds."""
    api = importlib.import_module("kivi_jax.api")
    if not hasattr(api, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    """The public names alone: rooms and modules are imported by their own."""
    return [*__getattr__("__all__"), "__version__"]
