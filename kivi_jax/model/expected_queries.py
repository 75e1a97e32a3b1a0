"""What queries after a prompt will be like, from those in it, for selectors that ask. Read `llama.py` next.

Queries before RoPE vary little with the position. Their mean and covariance over the prompt, turned as RoPE
turns them on average over the next positions, stand for the queries to come.

Source: Expected Attention (arXiv 2510.00636).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.prompt_selectors import ExpectedQueries

FUTURE_POSITIONS = 512  # over which the turns are averaged


class QuerySums(NamedTuple):
    """Sums over a prompt's queries, before RoPE: of themselves, and of their outer products."""

    queries: Float[Array, "B N H"]
    products: Float[Array, "B N H H"]


def no_queries(batch: int, heads: int, dim: int) -> QuerySums:
    """The sums over none."""
    shape = (batch, heads, dim)
    return QuerySums(jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, dim), jnp.float32))


def add_queries(sums: QuerySums, query: Float[Array, "B T N H"], real: Bool[Array, "B T"]) -> QuerySums:
    """The sums with those of a block's queries that are no padding."""
    query = jnp.where(real[..., None, None], query.astype(jnp.float32), 0)
    products = jnp.einsum("btnh,btnj->bnhj", query, query)
    return QuerySums(sums.queries + query.sum(1), sums.products + products)


def expected_queries(
    sums: QuerySums,
    lengths: Int[Array, "B"],
    rotate_at: Callable[[Int[Array, "B T"]], Callable[[Array], Array]],
) -> ExpectedQueries:
    """Mean and covariance of queries after prompts of `lengths`; `rotate_at(positions)` is RoPE there."""
    count = lengths.astype(jnp.float32)[:, None, None]
    mean = sums.queries / count
    covariance = sums.products / count[..., None] - mean[..., :, None] * mean[..., None, :]
    position = lengths[:, None] + jnp.arange(FUTURE_POSITIONS, dtype=lengths.dtype)[None]
    dim = mean.shape[-1]
    axes = jnp.broadcast_to(jnp.eye(dim, dtype=jnp.float32), (*position.shape, dim, dim))
    turn = rotate_at(position)(axes).mean(1)  # row i: what becomes of axis i
    return ExpectedQueries(
        jnp.einsum("bnh,bhj->bnj", mean, turn),
        jnp.einsum("bhj,bnhi,bik->bnjk", turn, covariance, turn),
    )
