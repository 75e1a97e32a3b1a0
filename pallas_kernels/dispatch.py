"""Kernels that some devices have, and saying once why one is not used."""

import functools
import importlib
import logging
from typing import Any

from pallas_kernels.device import compute_capability

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
