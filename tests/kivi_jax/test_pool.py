"""The pool against lists that are physically pruned, and against the recorded original SCOPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_jax.buffers import DenseTokens, Step, attend_token
from kivi_jax.pool import TokenPool
from kivi_jax.selection import H2O, Adaptive, Discontinuous, Slide, StreamingLLM
from kivi_jax.stores import DenseStore, PackedStore, hadamard
from pallas_kernels.partials import merge, normalize
from tests.oracles.scope import ListPool

HEADS, GROUPS, DIM = 2, 2, 8


@jax.jit
def step(segments, query, key, value, active):
    """One decode step over a layer's segments: what it attends to, and the segments after it."""
    attended = merge(*(s.attend(query) for s in segments), attend_token(query, key, value))
    grown = segments[-1].append(Step(query, key, value, attended.log_sum_exp, active))
    (settled,) = type(grown).settle([grown], active)
    return normalize(attended), (*segments[:-1], settled)


def empty_pool(lengths, heads, dim, selector, make=DenseStore.of, **options):
    nothing = jnp.zeros((len(lengths), heads, 0, dim))
    store = make(nothing, nothing, selector.slots, **options)
    return TokenPool.of(
        store, nothing[..., 0].astype(int), jnp.zeros_like(lengths), lengths, selector=selector
    )


def kept(pool, row, head):
    positions = np.asarray(pool.positions[row, head])
    return sorted(positions[positions >= 0].tolist())


class Schedule:
    """How many tokens stay after each step, told with plain integers."""

    def __init__(self, selector):
        self.selector, self.waited = selector, 0

    def stay(self, t, held):
        s = self.selector
        if isinstance(s, Discontinuous):
            window = min(s.window, s.recent + (t - 1) // s.delta)
            if held < window:
                return held
            if self.waited < s.delta:
                self.waited += 1
                return held
            self.waited = 0
            return min(window, held)
        if isinstance(s, Adaptive):
            return min(held, s.window, s.recent + (t - 1) // s.delta)
        return min(held, s.window)


SELECTORS = [
    Slide(window=6, recent=3),
    Slide(window=5, recent=1),
    Adaptive(window=9, recent=3, max_new_tokens=24),
    Discontinuous(window=9, recent=3, max_new_tokens=24),
    Discontinuous(window=8, recent=2, max_new_tokens=8),
]


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=2, max_size=2),
    ends=st.lists(st.integers(0, 30), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_pool_is_attention_over_a_pruned_list(selector, lengths, ends, seed):
    """Prompt lengths, seeds, and rows that end at different steps."""
    steps = 24
    draw = np.random.default_rng(seed)
    prompt = jnp.asarray(draw.normal(size=(2, 2, HEADS, 7, DIM)), jnp.float32)
    queries = jnp.asarray(draw.normal(size=(steps, 2, HEADS * GROUPS, DIM)) * 2, jnp.float32)
    tokens = jnp.asarray(draw.normal(size=(steps, 2, 2, HEADS, DIM)), jnp.float32)
    n = jnp.asarray(lengths)
    segments = (
        DenseTokens.from_prompt(prompt[0], prompt[1], n, capacity=7, window=None),
        empty_pool(n, HEADS, DIM, selector),
    )
    wide = np.asarray(prompt, np.float64)
    lists = {
        (b, k): ListPool([(wide[0, b, k, t], wide[1, b, k, t]) for t in range(lengths[b])], selector.recent)
        for b in range(2)
        for k in range(HEADS)
    }
    schedules = {b: Schedule(selector) for b in range(2)}
    for t in range(1, steps + 1):
        active = np.array([t <= end for end in ends])
        query, (key, value) = queries[t - 1], tokens[t - 1]
        out, segments = step(segments, query, key, value, jnp.asarray(active))
        for b in np.flatnonzero(active):
            held = len(lists[b, 0].tokens) + 1
            stay = schedules[b].stay(t, held)
            for k in range(HEADS):
                group = slice(k * GROUPS, (k + 1) * GROUPS)
                expected = lists[b, k].step(
                    np.asarray(query[b, group], np.float64),
                    lengths[b] + t - 1,
                    np.asarray(key[b, k], np.float64),
                    np.asarray(value[b, k], np.float64),
                )
                np.testing.assert_allclose(out[b, group], expected, atol=1e-5)
                if stay < held:
                    lists[b, k].keep(stay)
        for b, k in lists:
            assert kept(segments[-1], b, k) == lists[b, k].positions
            assert len(lists[b, k].positions) <= selector.slots
        assert segments[-1].held.tolist() == [len(lists[b, 0].tokens) for b in range(2)]


def replay(case, golden, inputs, selector, *, unified=False):
    """Kept sets of the original at every step against ours, one query head per KV head, layer 0."""
    order = golden[f"{case}__order"][:, 0].astype(int)  # steps + 1, H, slots; 255 is empty
    query, key, value = (jnp.asarray(inputs[name][0]) for name in "qkv")  # H, tokens, dim
    prompt_sets = [sorted(set(heads.tolist()) - {255}) for heads in order[0]]
    prompt = 96 if "P96" in case else int(case.split("_P")[1].split("_")[0])
    positions = jnp.asarray(prompt_sets)[None]
    index = positions[..., None]
    keys, values = (jnp.take_along_axis(x[None, :, :prompt], index, axis=2) for x in (key, value))
    count, length = jnp.asarray([positions.shape[2]]), jnp.asarray([prompt])
    if unified:
        store = DenseStore.of(keys, values, selector.slots)
        segments = (TokenPool.of(store, positions, count, length, selector=selector),)
    else:
        held = DenseTokens.from_prompt(keys, values, count, capacity=positions.shape[2], window=None)
        segments = (held, empty_pool(length, key.shape[0], key.shape[2], selector))
    for t in range(1, 61):
        at = prompt + t - 1
        _, segments = step(
            segments, query[None, :, at], key[None, :, at], value[None, :, at], jnp.asarray([True])
        )
        for head in range(key.shape[0]):
            ours = set(kept(segments[-1], 0, head)) | (set() if unified else set(prompt_sets[head]))
            assert ours == set(order[t, head].tolist()) - {255}, f"step {t}, head {head}"


@pytest.mark.parametrize("prompt", ["ALLKV", "H2O", "SnapKV"])
@pytest.mark.parametrize("metric", ["slide", "adaptive", "discontinuous"])
def test_kept_sets_equal_the_original_scope(shared, prompt, metric):
    """At each of 60 steps, per head. The original does not bound adaptive's window: ours is set wide."""
    golden = np.load(shared / "golden" / "scope_select_L1.npz")
    inputs = np.load(shared / "golden" / "scope_select_inputs.npz")
    if metric == "slide":
        replay(f"{prompt}+slide_L1_P96", golden, inputs, Slide(window=24, recent=8))
    else:
        kind = {"adaptive": Adaptive, "discontinuous": Discontinuous}[metric]
        selector = kind(window=40, recent=8, max_new_tokens=8 + 3 * 32)
        assert selector.delta == 3
        replay(f"{prompt}+{metric}_L1_P96_d3", golden, inputs, selector)


def test_kept_sets_equal_the_original_unified_h2o(shared):
    golden = np.load(shared / "golden" / "scope_select_L1.npz")
    inputs = np.load(shared / "golden" / "scope_select_inputs.npz")
    replay("H2O+h2o_L1_P96", golden, inputs, H2O(budget=72, recent=8), unified=True)


def test_streaming_llm_keeps_sinks_and_the_newest():
    selector = StreamingLLM(sinks=2, recent=3)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.normal(size=(2, 1, HEADS, 4, DIM)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(4), (1, HEADS, 4))
    n = jnp.asarray([4])
    store = DenseStore.of(tokens[0], tokens[1], selector.slots)
    segments = (TokenPool.of(store, positions, n, n, selector=selector),)
    for t in range(9):
        new = jnp.asarray(draw.normal(size=(2, 1, HEADS, DIM)), jnp.float32)
        query = jnp.asarray(draw.normal(size=(1, HEADS * GROUPS, DIM)), jnp.float32)
        _, segments = step(segments, query, new[0], new[1], jnp.asarray([True]))
        assert kept(segments[0], 0, 1) == [0, 1, *range(max(2, t + 2), t + 5)]


def test_ties_keep_the_newer_token():
    """Equal keys weigh the same under any query: the oldest of those that may go is let go."""
    selector = Slide(window=4, recent=2)
    n = jnp.asarray([0])
    segments = (empty_pool(n, HEADS, DIM, selector),)
    same = jnp.ones((1, HEADS, DIM))
    for _ in range(6):
        _, segments = step(segments, jnp.ones((1, HEADS * GROUPS, DIM)), same, same, jnp.asarray([True]))
    assert kept(segments[0], 0, 0) == [2, 3, 4, 5]


@pytest.mark.parametrize(("bits", "error"), [(2, 0.45), (4, 0.1), (8, 0.006)])
def test_a_packed_pool_holds_what_it_was_given(bits, error):
    """Outlier channel included, slots reused many times, rows that end: nearer with more bits."""
    selector, dim = Slide(window=12, recent=8), 32
    draw = np.random.default_rng(3)
    n = jnp.asarray([0, 0])
    segments = (
        empty_pool(n, HEADS, dim, selector, PackedStore.of, bits=bits, group_size=16, scale_dtype="float16"),
    )
    keys, values = draw.normal(size=(2, 40, 2, HEADS, dim)).astype(np.float32)
    keys[..., 5] += 12  # as keys of real models have
    for t in range(40):
        query = jnp.asarray(draw.normal(size=(2, HEADS * GROUPS, dim)), jnp.float32)
        active = jnp.asarray([True, t < 20])
        _, segments = step(segments, query, jnp.asarray(keys[t]), jnp.asarray(values[t]), active)
    pool = segments[0]
    assert pool.held.tolist() == [12, 12]
    held_keys, held_values = (np.asarray(x) for x in pool.store.read())
    for b, k in np.ndindex(2, HEADS):
        positions = np.asarray(pool.positions[b, k])
        slots = np.flatnonzero(positions >= 0)
        assert positions.max() == [39, 19][b]
        # Keys are held rotated: scores with a rotated query are what they were.
        turned = held_keys[b, k, slots] @ hadamard(dim)
        for got, true in ((turned, keys), (held_values[b, k, slots], values)):
            expected = true[positions[slots], b, k]
            assert np.linalg.norm(got - expected) < error * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [1, 8, 12, 80, 128])
def test_hadamard_is_orthonormal(size):
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
