"""The device that computations go to, which decides between implementations."""

from typing import Any

import jax


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
