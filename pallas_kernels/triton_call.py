"""Calling a kernel through Pallas' Triton backend, without the notice of its deprecation."""

import warnings
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jaxtyping import Array


def triton_call(kernel: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call`; with `compiler_params` of Triton, as JAX's versions prefer different backends."""

    def call(*operands: Array) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
            return pl.pallas_call(kernel, **options)(*operands)

    return call
