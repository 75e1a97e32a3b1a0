"""Shared test setup: strict dtypes and ranks, and where the recorded outputs of the original code are."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(os.environ.get("KIVI_JAX_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded outputs and real inputs; it stands beside a checkout, not inside it."""
    if not SHARED.is_dir():
        pytest.skip(f"no recorded outputs: {SHARED} is absent (set KIVI_JAX_SHARED to its path)")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def free_programs() -> Iterator[None]:
    """Free the programs that a module's tests have compiled.

    Each holds a few memory mappings; Linux allows a process 65,530, beyond which XLA's compiler crashes.
    """
    yield
    jax.clear_caches()
