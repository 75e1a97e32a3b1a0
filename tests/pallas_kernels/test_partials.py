import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.partials import AttentionPartial, attend, empty, merge, normalize
from tests.draws import normal
from tests.oracles import attention as oracle


def partial(seed: int, offset: float = 0.0) -> AttentionPartial:
    random = np.random.default_rng(seed)
    out, top = random.normal(size=(2, 3, 8)), 10 * random.normal(size=(2, 3)) + offset
    return AttentionPartial(*(jnp.asarray(x, jnp.float32) for x in (out, top, random.uniform(1, 9, (2, 3)))))


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
    query = normal(groups, batch, kv_heads * groups, dim, dtype=dtype)
    key, value = normal(groups + 1, 2, batch, kv_heads, slots, dim, dtype=dtype)
    visible = np.random.default_rng(groups).random((batch, kv_heads if per_head else 1, slots)) < 0.6
    visible[1] = False
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
    a, b, c = normal(0, 3, 1, 2, 32, 8)
    query, left = a[:, :, 0], (jnp.arange(32) < 11)[None, None, :]
    parts = [attend(query, b, c, seen, scale=1.0) for seen in (left, ~left, left | ~left)]
    assert_same(merge(parts[0], parts[1]), parts[2])
