"""Kernels that some devices have, and saying once why one is not used."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from pallas_kernels.device import compute_capability, default_device

TRITON = 8.0  # the compute capability from which on Pallas' Triton backend compiles

T = TypeVar("T")

_log = logging.getLogger(__name__)


def load_kernel(module: str, least: float, device: Any) -> Any:
    """Import a module whose kernel needs an NVIDIA GPU of compute capability `least`.

    Raises:
        NotImplementedError: `device` is no such GPU, or what the module imports is not installed.
    """
    if compute_capability(device) < least:
        raise NotImplementedError(f"needs an NVIDIA GPU of compute capability {least}, not {device}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotImplementedError(f"{error}") from error


@functools.lru_cache(maxsize=256)
def log_fallback(operation: str, implementation: str, reason: str) -> None:
    """Warn, once, that the next implementation is tried."""
    _log.warning("%s: %s is not used: %s", operation, implementation, reason)


def by_kernel_or_xla(operation: str, module: str, kernel: Callable[[Any], T], xla: Callable[[], T]) -> T:
    """`kernel(module)` on an NVIDIA GPU that Pallas' Triton backend compiles for, and `xla()` elsewhere.

    A case that the kernel refuses (`NotImplementedError`) is XLA's, too.
    """
    device = default_device()
    if device.platform == "gpu":
        try:
            return kernel(load_kernel(module, TRITON, device))
        except NotImplementedError as reason:
            log_fallback(operation, "pallas_triton", str(reason))
    return xla()


def with_derivatives_of(alike: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which has no derivatives, with those of a function that computes the same."""
    call = jax.custom_jvp(kernel)
    call.defjvp(functools.partial(jax.jvp, alike))
    return call
