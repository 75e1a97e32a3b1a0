"""The queries that a prompt lets expect, against turning every query to every later position."""

import functools

import jax.numpy as jnp
import numpy as np

from kivi_jax.model.expected_queries import FUTURE_POSITIONS, add_queries, expected_queries, no_queries
from kivi_jax.model.rope import apply_rope


def test_mean_and_covariance_are_those_of_turned_queries():
    """Two rows of different lengths, in two blocks; the average turn, in NumPy, position by position."""
    frequencies, dim = jnp.asarray([[1.0, 0.1]], jnp.float32), 4
    query = np.random.default_rng(0).normal(1, 1, (2, 10, 3, dim)).astype(np.float32)
    lengths = np.array([10, 7])
    sums = no_queries(2, 3, dim)
    for block in (slice(0, 6), slice(6, 10)):
        real = jnp.asarray(np.arange(10)[None, block] < lengths[:, None])
        sums = add_queries(sums, jnp.asarray(query[:, block]), real)
    rotate_at = functools.partial(lambda position: lambda x: apply_rope(x, position, frequencies, 1.0))
    found = expected_queries(sums, jnp.asarray(lengths), rotate_at)
    for row, n in enumerate(lengths):
        angle = np.arange(n, n + FUTURE_POSITIONS)[:, None] * np.array([1.0, 0.1])
        cos, sin = np.diag(np.cos(angle).mean(0)), np.diag(np.sin(angle).mean(0))
        turn = np.block([[cos, sin], [-sin, cos]])  # of row vectors
        seen = query[row, :n].astype(np.float64)
        np.testing.assert_allclose(found.mean[row], seen.mean(0) @ turn, atol=1e-4)
        for head in range(3):
            covariance = turn.T @ np.cov(seen[:, head].T, bias=True) @ turn
            np.testing.assert_allclose(found.covariance[row, head], covariance, atol=1e-4)
