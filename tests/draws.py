"""Inputs of tests, drawn by NumPy: `jax.random` compiles a program for every shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_attention.cases import Case


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Numbers of the standard normal distribution."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.dtype(dtype)))


def dense(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Case.dense`: a query, keys with a few outlying channels, and values."""
    random, store = np.random.default_rng(0), (case.batch, case.kv_heads, case.slots, case.head_dim)
    query = random.normal(size=(case.batch, case.kv_heads * case.query_groups, case.head_dim))
    key, value = random.normal(size=(2, *store))
    key[..., 3::7] += 4
    return tuple(jnp.asarray(x, jnp.float32) for x in (query, key, value))
