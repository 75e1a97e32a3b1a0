"""Segments against lists of tokens (tests/oracles/kivi.py)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kivi_jax.cache.dense import DenseTokens
from kivi_jax.cache.kivi import KiviQuantization, KiviTokens
from kivi_jax.cache.segments import Step, first_visible
from pallas_kernels.partials import normalize
from pallas_kernels.residual.ring import Ring
from tests import draws
from tests.oracles.kivi import ListKivi, attention

BATCH, KV_HEADS, GROUPS = 3, 2, 2


def normal(seed, *shape):
    """As NumPy's, of which a slice compiles nothing."""
    return np.asarray(draws.normal(seed, *shape))


def step(key, value, active):
    """A step of which only the token matters."""
    return Step(*map(jnp.asarray, (key, key, value, np.zeros(key.shape[:2], np.float32), active)))


@jax.jit
def append(segment, step):
    return type(segment).settle([segment.append(step)], step.active)[0]


@jax.jit
def attend(segment, query):
    return normalize(segment.attend(query))


@jax.jit
def materialize(segment):
    return segment.materialize()


def stream(segment, keys, values, steps, active=None):
    """Append `steps` tokens per row, the next ones of `keys` and `values` [B, K, T, H]."""
    rows = np.arange(len(keys))
    for i in range(steps):
        on = np.ones(len(rows), bool) if active is None else active[i]
        at = np.asarray(segment.lengths)
        segment = append(segment, step(keys[rows, :, at], values[rows, :, at], on))
    return segment


DEFAULTS = dict(
    key_bits=2, value_bits=4, key_group_size=4, value_group_size=4, residual_length=8, scale_dtype="float32"
)
from_prompt = jax.jit(KiviTokens.from_prompt, static_argnames=("quantization", "capacity", "window"))
dense_tokens = jax.jit(DenseTokens.from_prompt, static_argnames=("capacity", "window"))


def kivi_tokens(keys, values, lengths, *, capacity, window=None, **options):
    quantization = KiviQuantization(**(DEFAULTS | options))
    return from_prompt(keys, values, jnp.asarray(lengths), quantization, capacity=capacity, window=window)


def list_kivi(
    keys, values, tokens, *, key_bits=2, value_bits=4, key_group=4, value_group=4, residual=8, **more
):
    row = ListKivi(key_bits, value_bits, key_group, value_group, residual, **more)
    for t in range(tokens):
        row.append(keys[t], values[t])
    return row


@pytest.mark.parametrize(
    ("bits", "key_group", "value_group", "residual", "sinks", "turned"),
    [
        ((2, 4), 4, 8, 8, 0, False),
        ((2, 4), 4, 4, 8, 3, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((8, 8), 1, 1, 1, 0, False),
                ((2, 4), 4, 8, 8, 11, False),  # more sinks than residual
                ((2, 2), 2, 2, 6, 0, True),
                ((4, 2), 8, 4, 8, 0, True),
                ((1, 4), 4, 4, 12, 0, False),
                ((4, 8), 1, 1, 1, 24, False),  # and than any prompt
            )
        ),
    ],
)
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 21), min_size=BATCH, max_size=BATCH), steps=st.integers(0, 19))
def test_kivi_denotes_what_the_lists_hold(
    bits, key_group, value_group, residual, sinks, turned, lengths, steps
):
    """Any prompt length and number of steps: the same tokens, and the same attention."""
    keys, values = normal(0, BATCH, KV_HEADS, 40, 8), normal(1, BATCH, KV_HEADS, 40, 8)
    query = normal(2, BATCH, KV_HEADS * GROUPS, 8)
    segment = kivi_tokens(
        keys[:, :, :21],
        values[:, :, :21],
        lengths,
        capacity=40,
        key_bits=bits[0],
        value_bits=bits[1],
        key_group_size=key_group,
        value_group_size=value_group,
        residual_length=residual,
        sinks=sinks,
        rotate_keys=turned,
    )
    segment = stream(segment, keys, values, steps)
    held = jax.tree.map(np.asarray, materialize(segment))
    out = np.asarray(attend(segment, query))
    for b in range(BATCH):
        n = lengths[b] + steps
        position = held.position[b, 0]
        assert sorted(position[position >= 0]) == list(range(n))
        order = np.argsort(position)[(position < 0).sum() :]
        for k in range(KV_HEADS):
            row = list_kivi(
                keys[b, k],
                values[b, k],
                n,
                key_bits=bits[0],
                value_bits=bits[1],
                key_group=key_group,
                value_group=value_group,
                residual=residual,
                sinks=sinks,
                trim=turned / 16,
            )
            for seen, expected in zip((held.key, held.value), row.tokens(), strict=True):
                np.testing.assert_allclose(seen[b, k, order], np.array(expected), atol=2e-6)
            for g in range(GROUPS):
                head = k * GROUPS + g
                np.testing.assert_allclose(out[b, head], row.attend(query[b, head]), atol=1e-5)


@pytest.mark.parametrize(("dense", "sinks"), [(True, 0), (False, 0), (False, 3)])
@pytest.mark.parametrize("window", [7, *(pytest.param(window, marks=pytest.mark.slow) for window in (1, 24))])
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=BATCH, max_size=BATCH), steps=st.integers(0, 60))
def test_window_sees_the_last_tokens_and_holds_few(dense, sinks, window, lengths, steps):
    """Beyond the window nothing is seen, and the buffers do not grow with the length."""
    keys, values = normal(3, BATCH, KV_HEADS, 90, 8), normal(4, BATCH, KV_HEADS, 90, 8)
    query = normal(5, BATCH, KV_HEADS, 8)
    prompt = keys[:, :, :30], values[:, :, :30]
    if dense:
        segment = dense_tokens(*prompt, jnp.asarray(lengths), capacity=90, window=window)
        assert segment.keys.shape[2] == window
    else:
        segment = kivi_tokens(*prompt, lengths, capacity=90, window=window, sinks=sinks)
        assert segment.keys.shape[2] == -(-(window + 8) // 32) * 32
    segment = stream(segment, keys, values, steps)
    out = np.asarray(attend(segment, query))
    for b in range(BATCH):
        n = lengths[b] + steps
        first = max(0, n - window + 1)
        for k in range(KV_HEADS):
            if dense:
                expected = attention(
                    np.asarray(query[b, k], np.float64),
                    list(np.asarray(keys[b, k, first:n], np.float64)),
                    list(np.asarray(values[b, k, first:n], np.float64)),
                )
            else:
                expected = list_kivi(keys[b, k], values[b, k], n, sinks=sinks).attend(query[b, k], window)
            np.testing.assert_allclose(out[b, k], expected, atol=1e-5)


SLOTS = 258  # a quarter and half of it are read alone; a quarter is no whole number
BLOCK = 128  # of a row read by itself
PROMPT = normal(21, BATCH, KV_HEADS, SLOTS, 4), normal(22, BATCH, KV_HEADS, SLOTS, 4)


@settings(max_examples=20, deadline=None)
@example([1, 2, 250], 1.0)  # rows are read one by one
@example([0, 128, 129], 0.25)
@given(st.lists(st.integers(0, SLOTS), min_size=BATCH, max_size=BATCH), st.sampled_from([1.0, 0.25]))
def test_no_more_is_read_than_a_part_of_the_slots_or_where_rows_differ_than_each_has_filled(lengths, filled):
    keys, values = PROMPT
    query, lengths = normal(23, BATCH, KV_HEADS * GROUPS, 4), [int(n * filled) for n in lengths]
    read = [next(width for width in (65, 129, 258) if width >= max(lengths))] * BATCH
    if 2 * sum(lengths) < sum(read):
        read = [min(-(-n // BLOCK) * BLOCK, SLOTS) for n in lengths]
    is_unread = np.arange(SLOTS) >= np.array(read)[:, None, None]
    given = (jnp.asarray(np.where(is_unread[..., None], np.nan, x)) for x in (keys, values))
    out = np.asarray(attend(DenseTokens(*given, jnp.asarray(lengths), None), query))
    for b, k in np.ndindex(BATCH, KV_HEADS):
        for g in range(GROUPS):
            asked = np.asarray(query[b, k * GROUPS + g], np.float64)
            expected = attention(asked, list(keys[b, k, : lengths[b]]), list(values[b, k, : lengths[b]]))
            np.testing.assert_allclose(out[b, k * GROUPS + g], expected, atol=1e-5)


@settings(max_examples=10, deadline=None)
@example([900, 3, 0])
@example([259, 258, 0])
@given(st.lists(st.integers(0, 900), min_size=BATCH, max_size=BATCH))
def test_rows_that_are_read_one_by_one_see_their_windows(lengths):
    """Of a ring that has wrapped for some rows and not for others."""
    query = jnp.asarray(normal(24, BATCH, KV_HEADS * GROUPS, 4))
    ring = Ring(*map(jnp.asarray, PROMPT), jnp.asarray(lengths))
    expected = ring.attend(query, start=first_visible(ring.lengths, SLOTS), scale=0.5)
    out = attend(DenseTokens(ring.keys, ring.values, ring.lengths, SLOTS), query)
    np.testing.assert_allclose(out, normalize(expected), atol=1e-5)


def test_rows_that_ended_hold_what_they_held():
    """An inactive row appends nothing, and a full key block is not quantized a second time."""
    keys, values = normal(6, 2, KV_HEADS, 40, 8), normal(7, 2, KV_HEADS, 40, 8)
    lengths = [6, 3]
    active = np.ones((12, 2), bool)
    active[2:, 0] = False  # row 0 stops exactly where its first key block is full (6 + 2 = 8 = R)
    segment = stream(
        kivi_tokens(keys[:, :, :8], values[:, :, :8], lengths, capacity=40), keys, values, 12, active
    )
    keys, values = keys[:1], values[:1]
    alone = kivi_tokens(keys[:, :, :8], values[:, :, :8], lengths[:1], capacity=40)
    alone = stream(alone, keys, values, 2)
    assert list(np.asarray(segment.lengths)) == [8, 15]
    together, apart = jax.tree.map(np.asarray, (materialize(segment), materialize(alone)))
    held = apart.position[0, 0] >= 0
    np.testing.assert_array_equal(together.position[0], apart.position[0])
    np.testing.assert_array_equal(together.key[0][:, held], apart.key[0][:, held])
    np.testing.assert_array_equal(together.value[0][:, held], apart.value[0][:, held])


def test_capacity_exactly_full():
    """A cache filled to its last slot still denotes every token."""
    keys, values = normal(8, 1, KV_HEADS, 64, 8), normal(9, 1, KV_HEADS, 64, 8)
    query = normal(10, 1, KV_HEADS, 8)
    segment = stream(kivi_tokens(keys[:, :, :5], values[:, :, :5], [5], capacity=64), keys, values, 59)
    dense = dense_tokens(keys[:, :, :5], values[:, :, :5], jnp.asarray([5]), capacity=64, window=None)
    dense = stream(dense, keys, values, 59)
    np.testing.assert_array_equal(dense.keys, keys)
    assert list(np.asarray(segment.lengths)) == [64]
    for k in range(KV_HEADS):
        expected = list_kivi(keys[0, k], values[0, k], 64).attend(query[0, k])
        np.testing.assert_allclose(attend(segment, query)[0, k], expected, atol=1e-5)


@pytest.mark.parametrize(
    "scale_dtype", ["float16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("bfloat16", "float32"))]
)
def test_more_bits_are_closer(scale_dtype):
    """The error of what is held falls from 1 to 2 to 4 to 8 bits, whatever the scales are stored in."""
    keys, values = normal(11, 1, 1, 64, 8), normal(12, 1, 1, 64, 8)
    errors = []
    for bits in (1, 2, 4, 8):
        segment = kivi_tokens(
            keys, values, [64], capacity=64, key_bits=bits, value_bits=bits, scale_dtype=scale_dtype
        )
        held = jax.tree.map(np.asarray, materialize(segment))
        packed = held.position[0, 0] >= 0
        order = held.position[0, 0][packed]
        errors.append(float(np.abs(held.key[0, 0][packed] - keys[0, 0][order]).mean()))
    assert all(fewer > 1.8 * more for fewer, more in itertools.pairwise(errors)), errors


def test_groups_that_do_not_fit_are_refused():
    keys = normal(13, 1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"group_size=3 must divide the number of channels, 8"):
        kivi_tokens(keys, keys, [8], capacity=8, value_group_size=3)
    with pytest.raises(ValueError, match=r"residual_length=8 must be a multiple of key_group_size=3"):
        kivi_tokens(keys, keys, [8], capacity=8, key_group_size=3)
