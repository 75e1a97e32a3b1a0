"""Calling a kernel through Pallas' Triton backend, without the notice of its deprecation."""

import warnings
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl


def triton_call(kernel: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call`, of trees of arrays; `compiler_params` of Triton, as JAX's versions prefer others."""

    def call(*operands: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
            return pl.pallas_call(kernel, **options)(*operands)

    return call


def check_powers_of_two(channels: int, group_size: int) -> None:
    """Refuse sizes that no block of a kernel has.

    Raises:
        NotImplementedError: one is no power of two.
    """
    if channels & (channels - 1) or group_size & (group_size - 1):
        raise NotImplementedError(f"{channels} channels in groups of {group_size}: no powers of two")
