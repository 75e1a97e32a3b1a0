"""Splitting a step's heads, in Pallas' interpreter, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.cache.stores import hadamard
from pallas_kernels.heads import split_heads
from tests.draws import normal

BATCH, HEADS, KV_HEADS = 2, 20, 5


@pytest.mark.parametrize(
    ("dim", "turns", "dtype"),
    [
        (8, True, jnp.float32),
        (96, True, jnp.bfloat16),
        pytest.param(64, False, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(128, True, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_turns_queries_and_keys_and_leaves_values(dim, turns, dtype):
    """More heads than a program has rows, and programs with heads of two kinds."""
    key, value = normal(0, 2, BATCH, KV_HEADS, dim, dtype=dtype)
    (query,) = normal(1, 1, BATCH, HEADS, dim, dtype=dtype)
    matrix = hadamard(dim) if turns else None
    got = split_heads(query, key, value, matrix, interpret=True)
    multiplied = jnp.float32 if dtype == jnp.float32 else jnp.float16  # by the kernel of packed attention
    assert [part.dtype for part in got] == [multiplied, dtype, dtype]
    for x, part, turned in zip((query, key, value), got, (turns, turns, False), strict=True):
        assert part.shape == x.shape
        want = np.asarray(x, np.float64) @ (hadamard(dim) if turned else np.eye(dim))
        want = np.asarray(jnp.asarray(want, jnp.float32).astype(dtype), np.float64)
        # Sums of the same products: at most the rounding to 16 bits may fall differently.
        tolerance = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(part, np.float64), want, rtol=tolerance, atol=1e-6)
