import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.partials import AttentionPartial, attend, empty, merge, normalize
from tests.oracles import attention as oracle


def partial(seed: int, offset: float = 0.0) -> AttentionPartial:
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    out, top = jax.random.normal(a, (2, 3, 8)), 10 * jax.random.normal(b, (2, 3)) + offset
    return AttentionPartial(out, top, jax.random.uniform(c, (2, 3), minval=1.0, maxval=9.0))


def assert_same(x: AttentionPartial, y: AttentionPartial):
    for got, want in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), offset=st.sampled_from([0.0, 80.0, -1e4]))
def test_merge_is_associative_and_commutative(seed, offset):
    x, y, z = partial(seed), partial(seed + 1, offset), partial(seed + 2)
    assert_same(merge(merge(x, y), z), merge(x, merge(y, z)))
    assert_same(merge(x, y, z), merge(merge(x, y), z))
    assert_same(merge(x, y), merge(y, x))


def test_empty_is_neutral():
    x, nothing = partial(0), empty((2, 3, 8))
    for got in (merge(x, nothing), merge(nothing, x)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(x), strict=True):
            np.testing.assert_array_equal(a, b)
    assert_same(merge(nothing, nothing), nothing)
    assert not np.asarray(normalize(nothing)).any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_attend_equals_the_oracle(dtype, tolerance, per_head, groups):
    batch, kv_heads, slots, dim = 2, 2, 40, 16
    a, b, c, d = jax.random.split(jax.random.key(groups), 4)
    query = jax.random.normal(a, (batch, kv_heads * groups, dim), dtype)
    key = jax.random.normal(b, (batch, kv_heads, slots, dim), dtype)
    value = jax.random.normal(c, (batch, kv_heads, slots, dim), dtype)
    visible = jax.random.bernoulli(d, 0.6, (batch, kv_heads if per_head else 1, slots))
    visible = visible.at[1].set(False)
    got = jax.jit(lambda *x: attend(*x, scale=0.3))(query, key, value, visible)
    everywhere = np.broadcast_to(np.asarray(visible), (batch, kv_heads, slots))
    out, top, denom = oracle.attend(query, key, value, everywhere, 0.3)
    scale = np.abs(out).max()
    np.testing.assert_allclose(got.out, out, atol=tolerance * scale)
    np.testing.assert_allclose(got.denom, denom, rtol=tolerance)
    np.testing.assert_allclose(got.max[0], top[0], rtol=tolerance)
    np.testing.assert_allclose(got.log_sum_exp[0], top[0] + np.log(denom[0]), rtol=tolerance)


def test_a_row_of_unseen_tokens_is_empty():
    one = jnp.ones((1, 1, 4, 8))
    got = attend(one[:, :, 0], one, one, jnp.zeros((1, 1, 4), bool), scale=1.0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(empty((1, 1, 8))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_halves_merge_to_the_whole():
    a, b, c = (jax.random.normal(jax.random.key(i), (1, 2, 32, 8)) for i in range(3))
    query, left = a[:, :, 0], (jnp.arange(32) < 11)[None, None, :]
    parts = [attend(query, b, c, seen, scale=1.0) for seen in (left, ~left, left | ~left)]
    assert_same(merge(parts[0], parts[1]), parts[2])
