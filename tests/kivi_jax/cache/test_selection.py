"""Prompt selectors: against the recorded original, plain NumPy definitions, and their budgets."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kivi_jax as kj
from kivi_jax.cache.decode_selectors import drop_lowest, drop_one
from kivi_jax.cache.names import parse_cache
from kivi_jax.cache.prompt_selectors import ALL_QUERIES, ExpectedQueries, Prompt, pool_neighbours
from kivi_jax.model.attention import add_weights, causal_attention
from kivi_jax.plan.memory import plan_cache
from tests.models import config

WIDTH, HEADS, DIM = 96, 4, 16


def prompt(weights, lengths):
    """A prompt of which only weights matter."""
    tokens = jnp.zeros((*weights.shape, 8))
    return Prompt(tokens, tokens, jnp.asarray(weights), jnp.asarray(lengths))


def of_head(query, key, b, k):
    """A KV head's two queries, and its keys for each."""
    query, key = np.asarray(query), np.asarray(key)
    return query[b, 2 * k : 2 * k + 2], np.repeat(key[b, k][None], 2, 0)


def causal_weights(query, key, length):
    """Softmax weights [H, T, T] of every query of a row, NumPy float64."""
    query, key = (np.asarray(x[:, :length], np.float64) for x in (query, key))
    score = query @ key.swapaxes(1, 2) * query.shape[2] ** -0.5
    score = np.where(np.tril(np.ones((length, length), bool)), score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def select(selector, prompt, layer, layers):
    return selector.select(prompt, layer, layers)


@functools.partial(jax.jit, static_argnames=("observed", "block"))
def observed_weights(query, key, lengths, observed, block=7):
    """What prefill accumulates, block by block: [B, K, P]."""
    width, lengths = query.shape[2], jnp.asarray(lengths)
    total = jnp.zeros(key.shape[:3])
    for first in range(0, width, block):
        part = query[:, :, first : first + block].swapaxes(1, 2)
        position = first + np.arange(part.shape[1])
        start = jnp.int32(first)
        _, log_sum_exp = causal_attention(part, key, key, first=start, window=None)
        oldest = 0 if observed == ALL_QUERIES else lengths[:, None] - observed
        seen = (position[None] >= oldest) & (position[None] < lengths[:, None])
        total = add_weights(total, part, key, log_sum_exp, seen, first=start)
    return total


@pytest.mark.parametrize("observed", [5, ALL_QUERIES])
def test_weights_are_the_causal_softmax_summed_over_queries_and_heads(observed):
    draw = np.random.default_rng(0)
    query = jnp.asarray(draw.normal(size=(2, 4, 40, 8)), jnp.float32)
    key = jnp.asarray(draw.normal(size=(2, 2, 40, 8)), jnp.float32)
    lengths = [40, 23]
    got = observed_weights(query, key, lengths, observed)
    for b, n in enumerate(lengths):
        first = 0 if observed == ALL_QUERIES else n - observed
        for k in range(2):
            heads = causal_weights(*of_head(query, key, b, k), n)
            np.testing.assert_allclose(got[b, k, :n], heads[:, first:].sum((0, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("case", "selector", "layers"),
    [
        ("SnapKV+None_L1_P96", kj.SnapKV(budget=48, window=16), 1),
        ("SnapKV+None_L2_P96", kj.SnapKV(budget=48, window=16), 2),
        ("PyramidKV+None_L2_P96", kj.PyramidKV(budget=48, window=16), 2),
        ("StreamingLLM+None_L1_P96", kj.StreamingLLM(sinks=32, recent=16), 1),
    ],
)
def test_kept_prompt_tokens_equal_the_original(shared, case, selector, layers):
    """Per head, one query head per KV head. Where the original is causal: its H2O score is not."""
    file = shared / "golden" / f"scope_select_L{layers}.npz"
    if not file.exists():
        pytest.skip(f"{file.name} was not recorded here")
    golden, inputs = np.load(file), np.load(shared / "golden" / "scope_select_inputs.npz")
    for layer in range(layers):
        query, key = (jnp.asarray(inputs[name][layer][None, :, :WIDTH]) for name in "qk")
        weights = observed_weights(query, key, [WIDTH], selector.observed, block=32)
        positions, kept = selector.select(prompt(weights, [WIDTH]), layer, layers)
        for head in range(HEADS):
            expected = set(golden[f"{case}__order"][0, layer, head].astype(int).tolist()) - {255}
            assert set(positions[0, head, : kept[0]].tolist()) == expected


@pytest.mark.parametrize("selector", [kj.H2O(budget=10, recent=4), kj.PyramidInfer(budget=10, window=4)])
def test_first_tokens_stay_whatever_their_rank(selector):
    """Those that a cache holds as sinks; where a layer's budget is too small, before its newest."""
    weights = jnp.arange(40.0)[None, None] * jnp.ones((2, 3, 1))
    for layer in range(4):
        positions, kept = selector.select(prompt(weights, [40, 2]), layer, 4, first=3)
        assert positions[0, :, :3].tolist() == [[0, 1, 2]] * 3
        assert positions[1, 0, : kept[1]].tolist() == [0, 1]


def test_pooling_is_over_neighbours_before_the_window():
    weights = jnp.asarray(np.random.default_rng(1).random((1, 1, 12)), jnp.float32)
    end = jnp.asarray([9])
    inside = np.pad(np.asarray(weights[0, 0, :9], np.float64), 2)
    mean = pool_neighbours(weights, end, 5, "average")[0, 0, :9]
    np.testing.assert_allclose(mean, [inside[i : i + 5].mean() for i in range(9)], rtol=1e-6)
    largest = pool_neighbours(weights, end, 5, "max")[0, 0, :9]
    np.testing.assert_allclose(largest, [inside[i : i + 5].max() for i in range(9)], rtol=1e-6)


SELECTORS = [
    kj.StreamingLLM(sinks=2, recent=6),
    kj.H2O(budget=10, recent=4),
    kj.SnapKV(budget=10, window=4, kernel=3, pooling="max"),
    kj.PyramidKV(budget=10, window=4, beta=4, kernel=1),
    kj.PyramidInfer(budget=10, window=4, beta=4),
    kj.KeepAll(),
]


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_budgets_hold_and_recent_tokens_stay(selector, lengths, seed):
    """Per row and layer: real tokens only, each once, no more than the budget, the newest always."""
    weights = np.random.default_rng(seed).random((2, 3, 40), np.float32)
    layers = 4
    counts = []
    for layer in range(layers):
        found = select(selector, prompt(weights, lengths), layer, layers)
        positions, kept = jax.tree.map(np.asarray, found)
        most = selector.most(layer, layers, 40)
        assert positions.shape == (2, 3, most)
        for b, n in enumerate(lengths):
            assert int(kept[b]) <= min(n, most)
            for head in range(3):
                chosen = positions[b, head, : kept[b]].tolist()
                assert chosen == sorted(set(chosen))
                assert not chosen or chosen[-1] == n - 1
                recent = getattr(selector, "recent", getattr(selector, "window", n))
                assert set(range(max(0, n - recent), n)) <= set(chosen)
        counts.append(kept.tolist())
        alone, kept_alone = select(selector, prompt(weights[1:], lengths[1:]), layer, layers)
        np.testing.assert_array_equal(alone[0], positions[1])
        assert kept_alone[0] == kept[1]
    budget = getattr(selector, "budget", None)
    if budget is not None:
        for b, n in enumerate(lengths):
            if selector.keeps_all(n):
                assert all(count[b] == n for count in counts)


def test_dropping_one_is_dropping_the_lowest():
    draw = np.random.default_rng(2)
    score = jnp.asarray(draw.integers(0, 4, (3, 2, 9)), jnp.float32)
    positions = jnp.asarray(np.stack([draw.permutation(9) for _ in range(6)]).reshape(3, 2, 9)) - 1
    drop = jnp.asarray([True, False, True])
    one = jax.jit(drop_one)(score, positions, drop)
    many = jax.jit(drop_lowest)(score, positions, drop.astype(jnp.int32))
    np.testing.assert_array_equal(one, many)
    assert (np.asarray(one != positions).sum(-1) == np.asarray(drop)[:, None]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: kj.Slide(window=8, recent=8), "0 < recent < window"),
        (lambda: kj.H2O(budget=4, recent=0), "0 < recent < budget"),
        (lambda: kj.SnapKV(budget=8, window=4, kernel=2), "must be odd and positive"),
        (lambda: kj.Adaptive(window=8, recent=4, max_new_tokens=6), "must be at least"),
        (lambda: kj.StreamingLLM(sinks=-1, recent=2), "must not be negative"),
        (lambda: kj.kivi(decode=kj.H2O(budget=8, recent=4)), "nothing would be packed"),
    ],
)
def test_impossible_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def best(score, count):
    """The `count` highest; of equals, the newest."""
    return set(sorted(range(len(score)), key=lambda i: (score[i], i), reverse=True)[:count])


DEFINED = {
    "streamingllm": kj.StreamingLLM(sinks=3, recent=9),
    "h2o": kj.H2O(budget=12, recent=5),
    "snapkv": kj.SnapKV(budget=12, window=5, kernel=3),
    "snapkv, maximum": kj.SnapKV(budget=12, window=5, kernel=7, pooling="max"),
    "pyramidkv": kj.PyramidKV(budget=12, window=5, beta=7, kernel=5),
    "pyramidinfer": kj.PyramidInfer(budget=12, window=5, beta=3),
    "keepall": kj.KeepAll(),
    "keydiff": kj.KeyDiff(budget=12, recent=5),
    "expectedattention": kj.ExpectedAttention(budget=12, recent=5, sinks=2),
}


@pytest.mark.parametrize("name", DEFINED)
def test_prompt_selectors_are_their_papers_definitions(name):
    """Rows of several lengths, two query heads per KV head, five layers; against plain NumPy."""
    selector, layers, lengths = DEFINED[name], 5, [40, 23, 12, 6, 1]
    draw = np.random.default_rng(4)
    query = jnp.asarray(draw.normal(size=(len(lengths), 4, 40, 8)) * 2, jnp.float32)
    key = jnp.asarray(draw.normal(size=(len(lengths), 2, 40, 8)), jnp.float32)
    weights = jnp.zeros(key.shape[:3])
    if selector.observed:
        weights = observed_weights(query, key, lengths, selector.observed)
    value = jnp.asarray(draw.normal(size=key.shape), jnp.float32)
    wide = jnp.asarray(draw.normal(size=(len(lengths), 4, 8, 8)), jnp.float32)
    mean = jnp.asarray(draw.normal(size=(len(lengths), 4, 8)), jnp.float32)
    whole = Prompt(
        key, value, weights, jnp.asarray(lengths), ExpectedQueries(mean, wide @ wide.swapaxes(2, 3))
    )
    for layer in range(layers):
        positions, kept = jax.tree.map(np.asarray, select(selector, whole, layer, layers))
        for (b, n), k in itertools.product(enumerate(lengths), range(2)):
            heads = causal_weights(*of_head(query, key, b, k), n)
            if isinstance(selector, kj.KeyDiff | kj.ExpectedAttention):
                row = jax.tree.map(lambda x, b=b: np.asarray(x[b], np.float64), whole)
                expected = defined_by_keys(selector, row, n, k)
            else:
                expected = defined(selector, heads, n, layer, layers)
            assert set(positions[b, k, : kept[b]].tolist()) == expected


def defined(selector, weights, n, layer, layers):
    """The tokens that a paper keeps of a prompt of n, given all causal weights [H, n, n]."""
    if isinstance(selector, kj.KeepAll):
        return set(range(n))
    if isinstance(selector, kj.StreamingLLM):
        return {i for i in range(n) if i < selector.sinks or i >= n - selector.recent}
    window = selector.recent if isinstance(selector, kj.H2O) else selector.window
    cap = selector.budget
    if n <= cap:
        return set(range(n))
    if isinstance(selector, kj.PyramidKV | kj.PyramidInfer):
        base = cap - window
        if n >= 2 * base:  # else every layer keeps as many
            largest = min(2 * base - base // selector.beta, n - window)
            smallest = 2 * base - largest
            cap = min(n, largest - layer * ((largest - smallest) // layers) + window)
    queries = slice(n - window, n) if selector.observed == window else slice(0, n)
    score = weights[:, queries, : n - window].sum((0, 1))
    if kernel := getattr(selector, "kernel", 0):
        padded = np.pad(score, kernel // 2)
        neighbours = np.lib.stride_tricks.sliding_window_view(padded, kernel)
        score = neighbours.max(-1) if selector.pooling == "max" else neighbours.mean(-1)
    return best(score, cap - window) | set(range(n - window, n))


def defined_by_keys(selector, prompt, n, k):
    """The same of selectors that look at keys, values and queries of KV head `k` of one row."""
    keys, values = prompt.keys[k, :n], prompt.values[k, :n]
    if n <= selector.budget:
        return set(range(n))
    if isinstance(selector, kj.KeyDiff):
        direction = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        mean = direction.mean(0)
        score, first = -direction @ mean / np.linalg.norm(mean), 0
    else:
        first, expected = selector.sinks, np.zeros(n)
        for head in (2 * k, 2 * k + 1):
            m, c = prompt.queries.mean[head], prompt.queries.covariance[head]
            exponent = np.array([key @ m / 8**0.5 + key @ c @ key / 16 for key in keys[first:]])
            weight = np.exp(exponent - exponent.max())
            expected[first:] += weight / weight.sum() / 2
        score = (expected + 0.01) * np.linalg.norm(values, axis=1)
    older = np.where(np.arange(n - selector.recent) < first, np.inf, score[: n - selector.recent])
    return best(older, selector.budget - selector.recent) | set(range(n - selector.recent, n))


def test_of_equal_prompt_tokens_the_newer_stay():
    selector = kj.H2O(budget=5, recent=2)
    positions, _ = selector.select(prompt(jnp.ones((1, 1, 9)), [9]), 0, 1)
    assert positions[0, 0].tolist() == [4, 5, 6, 7, 8]


def test_a_pyramid_has_the_budgets_of_the_original():
    """Recorded from it: 79 and 48 of a prompt of 96, with a budget of 48 and a window of 16."""
    for selector in (kj.PyramidKV(budget=48, window=16), kj.PyramidInfer(budget=48, window=16)):
        budgets = [int(selector.kept(jnp.asarray([96]), layer, 2)[0]) for layer in range(2)]
        assert budgets == [79, 48]
        assert [selector.most(layer, 2, 96) for layer in range(2)] == [79, 48]


OPTIONS = dict(batch=2, context=64, prompt_tokens=40, dtype="float32")


@pytest.mark.parametrize(
    ("selecting", "plain"),
    [
        (kj.scope(decode=kj.Slide(window=8, recent=4)), kj.full()),
        (kj.scope(decode=kj.H2O(budget=48, recent=8)), kj.full()),
        (kj.kivi(2, 8, 16, decode=kj.Slide(window=8, recent=4)), kj.kivi(2, 8, 16)),
    ],
)
def test_layers_with_a_window_hold_it_and_select_nothing(selecting, plain):
    """Half of the layers weigh as without a selector, the others as without a window."""
    model = config(num_layers=2, sliding_window=16)

    def weigh(strategy, **changes):
        return plan_cache(replace(model, **changes), strategy, **OPTIONS)

    mixed = weigh(selecting, windowed=(True, False))
    windows, selected = weigh(plain), weigh(selecting, sliding_window=None)
    assert mixed == {part: (windows[part] + selected[part]) // 2 for part in mixed}


def test_where_every_layer_has_a_window_it_is_said_once_that_nothing_is_selected(caplog):
    model = config(sliding_window=17)
    names = ("scope", "scope:prompt=snapkv:prompt_budget=64:decode=keepall")
    plans = [plan_cache(model, parse_cache(name), **OPTIONS) for name in names]
    assert plans == [plan_cache(model, kj.full(), **OPTIONS)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "every layer of the model has a window of 17 tokens, which bounds its cache: nothing is selected"
    ]


def test_a_prompt_that_fills_a_pool_that_it_shares_is_refused():
    """With what to do; and taken if a prompt selector makes it small enough."""
    options = dict(batch=1, context=64, prompt_tokens=40, dtype="float32")
    shared = "scope:decode=h2o:budget=32:recent=8"
    with pytest.raises(ValueError, match=r"the prompt may keep 40 tokens, .* pass a prompt= selector"):
        plan_cache(config(), parse_cache(shared), **options)
    planned = plan_cache(
        config(), parse_cache(f"{shared}:prompt=h2o:prompt_budget=32:prompt_recent=8"), **options
    )
    assert planned["pool"] == 2 * 2 * 2 * 33 * 8 * 4  # layers, K and V, heads, slots, channels, bytes


def test_layers_of_a_prompt_that_is_kept_whole_are_held_alike():
    """So that one program holds them all, though a selector would keep other numbers in each."""
    model, strategy = config(num_layers=3), kj.scope(prompt=kj.PyramidKV(budget=48, window=16))
    assert [strategy.first_held_like(model, layer, width=48) for layer in range(3)] == [0, 0, 0]
    assert [strategy.first_held_like(model, layer, width=49) for layer in range(3)] == [0, 1, 2]
    assert [strategy.first_held_like(model, layer) for layer in range(3)] == [0, 1, 2]
