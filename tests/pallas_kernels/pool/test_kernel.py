"""A pool's steps by the kernels, in Pallas' interpreter, against XLA's."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.cache import pool as pool_segment
from kivi_jax.cache.decode_selectors import Adaptive, Slide
from kivi_jax.cache.pool import TokenPool
from kivi_jax.cache.segments import Step
from kivi_jax.cache.stores import Given
from kivi_jax.cache.unified_selectors import H2O, StreamingLLM
from pallas_kernels.partials import merge
from pallas_kernels.residual.ring import Token, attend_token
from tests.draws import normal


def pool_of(selector, lengths, *, heads, dim, dtype):
    """Rows of prompts with `lengths` tokens; of a selector that bounds these, too, the pool has them."""
    held = max(lengths) if selector.unified else 0
    keys, values = normal(0, 2, len(lengths), heads, held, dim, dtype=dtype)
    position = jnp.arange(held)[None, None]
    real = jnp.where(position < jnp.asarray(lengths)[:, None, None], position, -1)
    given = Given(keys, values, jnp.broadcast_to(real, keys.shape[:3]))
    return TokenPool.of(given, jnp.asarray(lengths), selector=selector)


def with_kernels(pool, query, key, value, active):
    """As on a GPU."""

    def by_kernel(operation, module, kernel, xla):
        function = getattr(importlib.import_module(module), operation)
        interpreted = functools.partial(function, interpret=True)
        return kernel(types.SimpleNamespace(**{operation: interpreted}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_segment, "by_kernel_or_xla", by_kernel)
        return with_xla(pool, query, key, value, active)


def with_xla(pool, query, key, value, active):
    attended = pool.attend(query)
    own = attend_token(query, Token(key, value), scale=query.shape[-1] ** -0.5)
    log_sum_exp = merge(attended, own).log_sum_exp
    return attended, pool.append(Step(query, key, value, log_sum_exp, active))


CASES = [
    # More slots than a program's block, some of them padding; a row that pauses, and one that begins late.
    (Slide(window=70, recent=20), {"heads": 2, "groups": 4, "dim": 256}),
    (H2O(budget=12, recent=5), {"heads": 1, "groups": 3, "dim": 20, "dtype": jnp.bfloat16}),
    pytest.param(
        Adaptive(window=9, recent=3, max_new_tokens=24),
        {"heads": 3, "groups": 1, "dim": 16},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        StreamingLLM(sinks=2, recent=7), {"heads": 1, "groups": 2, "dim": 64}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("selector", "shape"), CASES, ids=str)
def test_steps_equal_those_of_xla(selector, shape):
    """The same tokens stay, in the same slots; attention and weights are as near as rounding allows."""
    heads, groups, dim, dtype = shape["heads"], shape["groups"], shape["dim"], shape.get("dtype", jnp.float32)
    lengths, steps = [7, 0, 3], selector.bound + 20
    ours = xla = pool_of(selector, lengths, heads=heads, dim=dim, dtype=dtype)
    step_ours, step_xla = jax.jit(with_kernels), jax.jit(with_xla)
    for i in range(steps):
        query = normal(2 * i, 3, heads * groups, dim, dtype=dtype)
        key, value = normal(2 * i + 1, 2, 3, heads, dim, dtype=dtype)
        active = jnp.array([True, i % 5 != 2, i > 8])
        (got, ours), (want, xla) = (
            step(pool, query, key, value, active) for step, pool in ((step_ours, ours), (step_xla, xla))
        )
        atol = 1e-5 if dtype == jnp.float32 else 2e-2
        for name in ("out", "max", "denom"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=atol)
        np.testing.assert_allclose(ours.weights, xla.weights, rtol=1e-4, atol=1e-6)
        for name in ("positions", "lengths", "waited"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(xla, name), err_msg=name)
        for got, want in zip(jax.tree.leaves(ours.store), jax.tree.leaves(xla.store), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert np.asarray(ours.held[0]) == selector.bound


def test_more_query_heads_than_rows_are_refused():
    pool = pool_of(Slide(window=8, recent=2), [0], heads=1, dim=16, dtype=jnp.float32)
    token = normal(0, 1, 1, 16)
    with pytest.raises(NotImplementedError, match="17 query heads for a KV head: more than 16"):
        with_kernels(pool, normal(1, 1, 17, 16), token, token, jnp.ones(1, bool))
