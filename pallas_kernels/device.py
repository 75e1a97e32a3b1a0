"""The device that computations go to, which decides between implementations."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax

TRITON = 8.0  # the compute capability from which on Pallas' Triton backend compiles

T = TypeVar("T")

_log = logging.getLogger(__name__)


def default_device() -> Any:
    """The device that computations go to unless told otherwise."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def compute_capability(device: Any) -> float:
    """9.0 for an H100; 0 for what is not an NVIDIA GPU."""
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD GPUs have names instead
        return 0.0


def on_gpu_or_xla(name: str, kernel: Callable[[], T], xla: Callable[[], T]) -> T:
    """What `kernel` computes on a GPU that Pallas' Triton backend compiles for, and `xla` anywhere else.

    Where the kernel cannot do a case it raises `NotImplementedError`; that is logged once, and XLA does it.
    """
    if compute_capability(default_device()) >= TRITON:
        try:
            return kernel()
        except NotImplementedError as reason:
            log_fallback(name, str(reason))
    return xla()


@functools.lru_cache(maxsize=256)
def log_fallback(name: str, reason: str) -> None:
    """Say once that a kernel is not used, and why."""
    _log.warning("%s is not used: %s", name, reason)
