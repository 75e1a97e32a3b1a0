"""The pool against lists that are physically pruned, and against the recorded original SCOPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_jax.cache.decode_selectors import GKV, Adaptive, Discontinuous, Random, Slide, Slots, VaSE
from kivi_jax.cache.dense import DenseTokens
from kivi_jax.cache.pool import TokenPool
from kivi_jax.cache.segments import Step, attend_token
from kivi_jax.cache.stores import Given, PoolQuantization, hadamard
from kivi_jax.cache.unified_selectors import H2O, StreamingLLM
from pallas_kernels.partials import merge, normalize
from tests.oracles.scope import ListPool, Remembered, Reserved, by_weight

HEADS, GROUPS, DIM = 2, 2, 8


@jax.jit
def step(segments, query, key, value, active):
    """One decode step over a layer's segments: what it attends to, and the segments after it."""
    attended = merge(*(s.attend(query) for s in segments), attend_token(query, key, value))
    grown = segments[-1].append(Step(query, key, value, attended.log_sum_exp, active, active))
    (settled,) = type(grown).settle([grown], active)
    return normalize(attended), (*segments[:-1], settled)


def empty_pool(lengths, heads, dim, selector, **packing):
    nothing = jnp.zeros((len(lengths), heads, 0, dim))
    given = Given(nothing, nothing, nothing[..., 0].astype(int))
    return TokenPool.of(given, lengths, selector=selector, **packing)


def full_pool(keys, values, lengths, selector, **packing):
    """A pool that holds right-padded prompts."""
    position = jnp.arange(keys.shape[2])[None, None]
    real = jnp.where(position < lengths[:, None, None], position, -1)
    given = Given(keys, values, jnp.broadcast_to(real, keys.shape[:3]))
    return TokenPool.of(given, lengths, selector=selector, **packing)


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
        if isinstance(s, StreamingLLM):
            return min(held, s.sinks + s.recent)
        return min(held, s.budget if isinstance(s, H2O) else s.window)


SELECTORS = [
    Slide(window=6, recent=3),
    pytest.param(Slide(window=5, recent=1), marks=pytest.mark.slow),
    pytest.param(Adaptive(window=9, recent=3, max_new_tokens=24), marks=pytest.mark.slow),
    pytest.param(Discontinuous(window=9, recent=3, max_new_tokens=24), marks=pytest.mark.slow),
    Discontinuous(window=8, recent=2, max_new_tokens=8),
    H2O(budget=9, recent=3),
    *(
        pytest.param(selector, marks=pytest.mark.slow)
        for selector in (
            StreamingLLM(sinks=2, recent=7),
            GKV(window=6, recent=2),
            VaSE(window=6, recent=2, reserve=2),
            Random(window=6, recent=2, seed=5),
            Random(window=8, recent=2, block=4),
        )
    ),
]


def rank_of(selector, head):
    """How the oracle ranks what `selector` does, for one KV head."""
    if isinstance(selector, GKV):
        return Remembered(selector.decay)
    if isinstance(selector, VaSE):
        return Reserved(selector.reserve)
    if isinstance(selector, Random):
        return lambda tokens, _: draws(selector, [token[0] for token in tokens])[head].tolist()
    return by_weight


def draws(selector, positions, heads=4, layer=0):
    """What a `Random` draws for tokens at `positions`, by head."""
    at = jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (1, heads, len(positions)))
    zeros = jnp.zeros(at.shape)
    return np.asarray(selector.score(Slots(at, zeros, None, jnp.asarray([layer])))[0])


LONGEST = 7  # tokens of a prompt: no more than the pools hold that prompts share with the output


def held_segments(prompt, lengths, selector):
    """A layer after right-padded prompts [2, B, K, P, H]: dense tokens and an empty pool, or one pool."""
    heads, width, dim = prompt.shape[2:]
    if not selector.unified:
        dense = DenseTokens.from_prompt(prompt[0], prompt[1], lengths, capacity=width, window=None)
        return dense, empty_pool(lengths, heads, dim, selector)
    return (full_pool(*prompt, lengths, selector),)


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_pool_is_attention_over_a_pruned_list(selector, data):
    """Prompt lengths, seeds, numbers of rows and heads, and rows that end at different steps."""
    steps = 24
    batch, heads, groups = data.draw(st.sampled_from([(2, 2, 2), (1, 3, 1), (3, 1, 4)]))
    per_row = dict(min_size=batch, max_size=batch)
    lengths = data.draw(st.lists(st.integers(1, LONGEST), **per_row))
    ends = data.draw(st.lists(st.integers(0, 30), **per_row))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    prompt = jnp.asarray(draw.normal(size=(2, batch, heads, LONGEST, DIM)), jnp.float32)
    queries = jnp.asarray(draw.normal(size=(steps, batch, heads * groups, DIM)) * 2, jnp.float32)
    tokens = jnp.asarray(draw.normal(size=(steps, 2, batch, heads, DIM)), jnp.float32)
    segments = held_segments(prompt, jnp.asarray(lengths), selector)
    wide = np.asarray(prompt, np.float64)
    lists = {
        (b, k): ListPool(
            [(wide[0, b, k, t], wide[1, b, k, t]) for t in range(lengths[b])],
            selector.recent,
            sinks=getattr(selector, "sinks", None),
            unified=selector.unified,
            rank=rank_of(selector, k),
        )
        for b in range(batch)
        for k in range(heads)
    }
    schedules = {b: Schedule(selector) for b in range(batch)}
    for t in range(1, steps + 1):
        active = np.array([t <= end for end in ends])
        query, (key, value) = queries[t - 1], tokens[t - 1]
        out, segments = step(segments, query, key, value, jnp.asarray(active))
        for b in np.flatnonzero(active):
            held = len(lists[b, 0].tokens) + 1
            stay = schedules[b].stay(t, held)
            for k in range(heads):
                group = slice(k * groups, (k + 1) * groups)
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
        assert segments[-1].held.tolist() == [len(lists[b, 0].tokens) for b in range(batch)]


def test_random_draws_are_uniform_and_independent():
    """By token, head, layer and seed; tokens of a block share one."""
    selector, tokens = Random(window=64, recent=8), range(4096)
    every = np.concatenate(
        [
            draws(Random(window=64, recent=8, seed=seed), tokens, layer=layer)
            for seed in (0, 1)
            for layer in (0, 1)
        ]
    )
    assert np.histogram(every[0], bins=8, range=(0, 1))[0].min() > 4096 / 8 * 0.85
    assert np.abs(np.corrcoef(every) - np.eye(len(every))).max() < 0.08
    assert np.abs(np.corrcoef(every[0][1:], every[0][:-1])[0, 1]) < 0.08
    blocks = draws(Random(window=64, recent=8, block=32), tokens)[0].reshape(-1, 32)
    assert (blocks == blocks[:, :1]).all()
    assert len(np.unique(blocks[:, 0])) == 128
    assert not selector.weighs


def replay(case, golden, inputs, selector):
    """Kept sets of the original at every step against ours, one query head per KV head, layer 0."""
    order = golden[f"{case}__order"][:, 0].astype(int)  # steps + 1, H, slots; 255 is empty
    query, key, value = (jnp.asarray(inputs[name][0]) for name in "qkv")  # H, tokens, dim
    prompt_sets = [sorted(set(heads.tolist()) - {255}) for heads in order[0]]
    prompt = 96 if "P96" in case else int(case.split("_P")[1].split("_")[0])
    positions = jnp.asarray(prompt_sets)[None]
    index = positions[..., None]
    keys, values = (jnp.take_along_axis(x[None, :, :prompt], index, axis=2) for x in (key, value))
    count, length = jnp.asarray([positions.shape[2]]), jnp.asarray([prompt])
    if selector.unified:
        segments = (TokenPool.of(Given(keys, values, positions), length, selector=selector),)
    else:
        held = DenseTokens.from_prompt(keys, values, count, capacity=positions.shape[2], window=None)
        segments = (held, empty_pool(length, key.shape[0], key.shape[2], selector))
    for t in range(1, 61):
        at = prompt + t - 1
        _, segments = step(
            segments, query[None, :, at], key[None, :, at], value[None, :, at], jnp.asarray([True])
        )
        for head in range(key.shape[0]):
            ours = set(kept(segments[-1], 0, head)) | (set() if selector.unified else set(prompt_sets[head]))
            assert ours == set(order[t, head].tolist()) - {255}, f"step {t}, head {head}"


def growing(kind, delta):
    """A selector whose window grows every `delta` steps. The original does not bound it: ours is set wide."""
    selector = kind(window=80, recent=8, max_new_tokens=8 + delta * 72)
    assert selector.delta == delta
    return selector


@pytest.fixture(scope="module")
def recorded(shared):
    """The original's kept tokens, and the queries, keys and values it was given."""
    files = ("L1", "shortprompts", "inputs")
    one, short, inputs = (dict(np.load(shared / "golden" / f"scope_select_{name}.npz")) for name in files)
    return one | short, inputs


REPLAYS = {
    **{f"{p}+slide_L1_P96": Slide(window=24, recent=8) for p in ("ALLKV", "H2O", "SnapKV")},
    "SnapKV+slide_L1_P96_k7_maxpool": Slide(window=24, recent=8),
    **{f"{p}+adaptive_L1_P96_d3": growing(Adaptive, 3) for p in ("ALLKV", "H2O", "SnapKV")},
    **{f"{p}+discontinuous_L1_P96_d3": growing(Discontinuous, 3) for p in ("ALLKV", "H2O", "SnapKV")},
    "H2O+adaptive_L1_P96_d5": growing(Adaptive, 5),
    "H2O+discontinuous_L1_P96_d5": growing(Discontinuous, 5),
    # Prompts of just the budget, and a little more; those below it the original prunes as if decoded.
    **{f"{p}+slide_L1_P{n}": Slide(window=24, recent=8) for p in ("H2O", "SnapKV") for n in (48, 49, 60)},
    **{f"ALLKV+slide_L1_P{n}": Slide(window=24, recent=8) for n in (40, 47, 48, 49, 60)},
    **{f"H2O+adaptive_L1_P{n}_d3": growing(Adaptive, 3) for n in (48, 49, 60)},
    **{f"H2O+discontinuous_L1_P{n}_d3": growing(Discontinuous, 3) for n in (48, 49, 60)},
    "H2O+h2o_L1_P96": H2O(budget=72, recent=8),
    "H2O+h2o_L1_P96_DW9_R8": H2O(budget=57, recent=8),
    **{f"H2O+h2o_L1_P{n}": H2O(budget=72, recent=8) for n in (40, 47, 48, 49, 60)},
}


@pytest.mark.parametrize("case", REPLAYS)
def test_kept_sets_equal_the_original_scope(recorded, case):
    """At each of 60 steps, per head."""
    replay(case, *recorded, REPLAYS[case])


def test_streaming_llm_keeps_sinks_and_the_newest():
    selector = StreamingLLM(sinks=2, recent=3)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.normal(size=(2, 1, HEADS, 4, DIM)), jnp.float32)
    segments = (full_pool(*tokens, jnp.asarray([4]), selector),)
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


@pytest.mark.parametrize(
    ("selector", "bits", "error"),
    [
        (Slide(window=20, recent=8), 2, 0.45),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (Slide(window=20, recent=8), 8, 0.006),
                (StreamingLLM(sinks=2, recent=9), 4, 0.1),
                (Slide(window=20, recent=8), 4, 0.1),
            )
        ),
    ],
    ids=repr,
)
def test_a_packed_pool_holds_what_it_was_given(selector, bits, error):
    """An outlier channel, slots reused, rows that end: nearer with more bits; the newest as they are."""
    dim, lengths, steps = 32, np.array([10, 0]), np.array([40, 25])
    draw = np.random.default_rng(3)
    keys, values = draw.normal(size=(2, 2, HEADS, 52, dim)).astype(np.float32)
    keys[..., 5] += 12  # as keys of real models have
    packing = dict(packing=PoolQuantization(bits=bits, group_size=16))
    if selector.unified:
        prompts = (jnp.asarray(x[:, :, :10]) for x in (keys, values))
        pool = full_pool(*prompts, jnp.asarray(lengths), selector, **packing)
    else:
        pool = empty_pool(jnp.asarray(lengths), HEADS, dim, selector, **packing)
    segments = (pool,)
    for t in range(max(steps)):
        query = jnp.asarray(draw.normal(size=(2, HEADS * GROUPS, dim)), jnp.float32)
        new = (jnp.asarray(x[np.arange(2), :, lengths + np.minimum(t, steps - 1)]) for x in (keys, values))
        _, segments = step(segments, query, *new, jnp.asarray(t < steps))
    pool = segments[0]
    assert pool.held.tolist() == [selector.bound, selector.bound]
    held_keys, held_values = (np.asarray(x) for x in pool.store.read())
    for b, k in np.ndindex(2, HEADS):
        slots = np.flatnonzero(np.asarray(pool.positions[b, k]) >= 0)
        positions, end = np.asarray(pool.positions[b, k, slots]), lengths[b] + steps[b]
        assert len(set(positions)) == selector.bound
        newest = positions >= end - selector.recent
        assert sorted(positions[newest]) == list(range(end - selector.recent, end))
        if isinstance(selector, StreamingLLM):
            assert set(positions[~newest]) == {0, 1}
        # Keys are held rotated: scores with a rotated query are what they were.
        turned = held_keys[b, k, slots] @ hadamard(dim)
        for got, true in ((turned, keys), (held_values[b, k, slots], values)):
            expected = true[b, k, positions]
            np.testing.assert_allclose(got[newest], expected[newest], atol=1e-5)
            assert np.linalg.norm(got - expected) < error * np.linalg.norm(expected)
            assert not np.allclose(got[~newest], expected[~newest], atol=1e-5)


@pytest.mark.parametrize("size", [1, 8, 12, 80, 128])
def test_hadamard_is_orthonormal(size):
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize(("field", "value"), [("bits", 3), ("group_size", 0)])
def test_what_a_pool_cannot_be_packed_as_is_said_at_once(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} must be"):
        PoolQuantization(**{field: value})
