"""`generate`: against recorded greedy texts, how rows end, sampling per row, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kivi_jax as kj
from kivi_jax import Llama
from kivi_jax.cache.pool import TokenPool
from kivi_jax.generation.generate import _advance, end_ids, row_keys
from kivi_jax.generation.prefix import prefill, weights_mark
from tests.models import config, random_llama, stories

LENGTHS = np.array([4, 9, 12])
NEW = 12
SCOPE = kj.kivi(
    2, 8, 8, prompt=kj.SnapKV(budget=8, window=2), decode=kj.Slide(window=4, recent=2)
)  # prompts longer and shorter than the budget
UNIFIED = kj.scope(prompt=kj.StreamingLLM(sinks=2, recent=6), decode=kj.StreamingLLM(sinks=2, recent=8))


def prompts(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, (3, 12)), jnp.int32)


def generate(ids=None, lengths=LENGTHS, **options):
    """Three rows on a random model; equal options share a compiled program."""
    options = dict(cache=kj.full(), max_new_tokens=NEW, eos_ids=()) | options
    model = random_llama(config())
    return kj.generate(model, prompts() if ids is None else ids, jnp.asarray(lengths), **options)


@pytest.fixture(scope="module")
def endless():
    """What the rows say when nothing ends them."""
    return np.asarray(generate().tokens)


def continue_ids(model, ids, count):
    out = kj.generate(
        model,
        jnp.asarray(ids)[None],
        jnp.asarray([len(ids)]),
        cache=kj.full(),
        max_new_tokens=count,
        eos_ids=(),
    )
    return np.asarray(out.tokens[0])


def test_200_greedy_tokens_equal_transformers(shared):
    golden = np.load(shared / "models" / "stories260K" / "golden_hf.npz")
    ids, prompt = golden["greedy_ids"], int(golden["prompt_len"])
    got = continue_ids(stories(shared), ids[:prompt], 200)
    np.testing.assert_array_equal(got, ids[prompt : prompt + 200])


@pytest.mark.parametrize("prompt", [17, 32, 64, 77])
def test_64_greedy_tokens_equal_transformers(shared, prompt):
    file = shared / "golden" / f"kivi_stream_stories260K_T{prompt}.npz"
    if not file.exists():
        pytest.skip(f"{file.name} was not recorded here")
    golden = np.load(file)
    got = continue_ids(stories(shared), golden["prompt_ids"], 64)
    np.testing.assert_array_equal(got, golden["fp_ids"])


def expected_rows(endless, eos_ids):
    """Each row up to and with its first end, then padding."""
    tokens, lengths = np.full_like(endless, eos_ids[0]), []
    for row, said in zip(tokens, endless, strict=True):
        ends = np.flatnonzero(np.isin(said, eos_ids))
        lengths.append(int(ends[0]) + 1 if len(ends) else NEW)
        row[: lengths[-1]] = said[: lengths[-1]]
    return tokens, lengths


@pytest.mark.parametrize(
    ("cache", "steps"),
    [
        (kj.full(), (4,)),
        (kj.full(), (0, 3)),
        (kj.kivi(2, 8, 8), (2, 5, 7)),
        (SCOPE, (0, 5, 7)),
        (UNIFIED, (0, 5, 7)),
    ],
    ids=["full-one", "full-two", "kivi2-three", "scope-three", "unified-three"],
)
def test_rows_end_at_their_own_step(cache, steps):
    """End-of-sequence tokens are taken from what rows 0, 1, 2 say at the given steps."""
    said = np.asarray(generate(cache=cache).tokens)
    eos_ids = tuple(int(said[row, step]) for row, step in enumerate(steps))
    out = generate(cache=cache, eos_ids=eos_ids)
    tokens, lengths = expected_rows(said, eos_ids)
    assert min(lengths) < NEW
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.lengths, lengths)
    np.testing.assert_array_equal(out.cache.lengths, LENGTHS + np.array(lengths) - 1)


@pytest.mark.parametrize("cache", [kj.full(), SCOPE, UNIFIED], ids=["full", "scope", "unified"])
def test_a_row_that_ends_at_once_adds_nothing_to_the_cache(endless, cache):
    out = generate(lengths=LENGTHS, cache=cache, eos_ids=tuple(endless[:, 0].tolist()))
    assert out.lengths.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(out.cache.lengths, LENGTHS)
    np.testing.assert_array_equal(out.tokens[:, 0], endless[:, 0])
    for pool in (
        segment for layer in out.cache.layers for segment in layer if isinstance(segment, TokenPool)
    ):
        expected = np.minimum(LENGTHS, 8) if cache == UNIFIED else 0 * LENGTHS
        np.testing.assert_array_equal(pool.held, expected)
        np.testing.assert_array_equal((np.asarray(pool.positions) >= 0).sum(-1), expected[:, None] + [[0, 0]])


def test_the_models_own_end_tokens_are_the_default(endless):
    eos = int(endless[0, 2])
    model = random_llama(config())
    ending = random_llama(config(eos_ids=(eos,)))
    for seen, expected in zip(jax.tree.leaves(ending), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(seen, expected)
    options = dict(cache=kj.full(), max_new_tokens=NEW)
    out = kj.generate(ending, prompts(), jnp.asarray(LENGTHS), **options)
    np.testing.assert_array_equal(out.tokens, expected_rows(endless, (eos,))[0])


def test_without_end_tokens_every_row_is_full(endless):
    out = generate()
    assert out.lengths.tolist() == [NEW] * 3
    np.testing.assert_array_equal(out.cache.lengths, LENGTHS + NEW - 1)
    assert out.cache.capacity == 12 + NEW


def test_one_new_token(endless):
    out = generate(max_new_tokens=1)
    np.testing.assert_array_equal(out.tokens, endless[:, :1])
    assert out.lengths.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(out.cache.lengths, LENGTHS)


SAMPLER = kj.Sample(temperature=1.5, top_k=40, top_p=0.95, repetition_penalty=1.1)


def test_a_sampled_row_is_the_same_alone():
    keys = row_keys(jax.random.key(7), 3)
    together = generate(sampler=SAMPLER, key=jax.random.key(7))
    np.testing.assert_array_equal(generate(sampler=SAMPLER, key=keys).tokens, together.tokens)
    for row in range(3):
        alone = generate(
            prompts()[row : row + 1], LENGTHS[row : row + 1], sampler=SAMPLER, key=keys[row : row + 1]
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_keys_decide_what_is_sampled():
    same, first, other = (
        np.asarray(generate(sampler=SAMPLER, key=jax.random.key(s)).tokens) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(same, first)
    assert (first != other).any(1).all()
    twins = generate(jnp.tile(prompts()[:1], (3, 1)), [4] * 3, sampler=SAMPLER, key=jax.random.key(1))
    assert len({tuple(row) for row in np.asarray(twins.tokens).tolist()}) == 3  # rows draw apart


@pytest.mark.parametrize("penalty", [1.3, 1e9])
def test_repetition_penalty_counts_prompt_and_new_tokens(penalty):
    """A step-by-step reading; what stands in the padding is not counted."""
    model, ids = random_llama(config()), np.asarray(prompts())
    out = generate(sampler=kj.Greedy(repetition_penalty=penalty))
    logits, cache = model.prefill(jnp.asarray(ids), jnp.asarray(LENGTHS), cache=kj.full(), capacity=24)
    seen = [set(row[:n].tolist()) for row, n in zip(ids, LENGTHS, strict=True)]
    for step in range(NEW):
        scores = np.array(logits)
        for row in range(3):
            for token in seen[row]:
                scores[row, token] *= penalty if scores[row, token] < 0 else 1 / penalty
        token = scores.argmax(-1)
        np.testing.assert_array_equal(out.tokens[:, step], token)
        for row in range(3):
            seen[row].add(int(token[row]))
        logits, cache = model.decode(jnp.asarray(token, jnp.int32), cache)


def test_one_compilation_for_other_prompts_lengths_and_keys():
    _advance.clear_cache()
    for seed, lengths in ((0, [12, 1, 5]), (1, [3, 3, 3])):
        generate(prompts(seed), lengths, sampler=SAMPLER, key=jax.random.key(seed))
    assert _advance._cache_size() == 1


def test_generate_can_be_traced():
    """Inside another jit lengths are unknown, and nothing asks for them."""
    model = random_llama(config())

    @jax.jit
    def both(ids, lengths):
        return kj.generate(model, ids, lengths, cache=kj.full(), max_new_tokens=NEW, eos_ids=()).tokens

    np.testing.assert_array_equal(both(prompts(), jnp.asarray(LENGTHS)), generate().tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(lengths=[0, 5, 5]), "every length must be from 1 to 12 .* got 0 to 5"),
        (dict(lengths=[5, 5, 13]), "every length must be from 1 to 12 .* got 5 to 13"),
        (dict(cache=kj.kivi(2, 32, 32)), "value_group_size=32 must divide the model's head_dim=8"),
        (dict(sampler=kj.Sample()), "needs a PRNG key"),
        (dict(sampler=kj.Sample(), key=jax.random.split(jax.random.key(0))), "one key per row"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**options)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_an_old_key_is_the_new_one(rows):
    new, old = jax.random.key(7), jax.random.PRNGKey(7)
    expected = jax.random.key_data(row_keys(new, rows))
    np.testing.assert_array_equal(jax.random.key_data(row_keys(old, rows)), expected)
    assert row_keys(jax.random.split(old, rows), rows).shape == (rows,)


@pytest.mark.parametrize("key", [7, "7", np.zeros(3, np.uint32), jnp.float32(1)])
def test_no_key_at_all_is_refused(key):
    with pytest.raises(ValueError, match="key is no PRNG key"):
        row_keys(key, 1)


@pytest.mark.parametrize("ends", [3, (3,), [3]])
def test_ends_come_in_many_kinds(ends):
    assert end_ids(random_llama(config()), ends) == (3,)


def test_logits_that_are_no_numbers_are_said_to_be(caplog):
    """In the row where they occur, and once."""
    model = Llama(config(num_layers=1), rngs=nnx.Rngs(0))
    model.embed.embedding[...] = model.embed.embedding[...].at[9].set(jnp.nan)
    ids = jnp.asarray([[1, 9], [1, 2]])
    out = kj.generate(model, ids, jnp.asarray([2, 2]), cache=kj.full(), max_new_tokens=3, eos_ids=())
    assert out.finite.tolist() == [False, True]
    assert [record.message[:40] for record in caplog.records] == ["the model's logits are not finite, so th"]


def test_a_prefix_of_other_weights_is_refused():
    """Of models with the same shapes, too, where it is kept."""
    models = [random_llama(config(num_layers=1), seed) for seed in (0, 1)]
    assert weights_mark(models[0]) != weights_mark(models[1])
    ids, lengths = jnp.asarray([[1, 2]]), jnp.asarray([2])
    prefix = prefill(models[0], ids, lengths, cache=kj.full(), capacity=2)
    prefix = dataclasses.replace(prefix, mark=weights_mark(models[0]))
    kj.generate(models[0], ids, lengths, prefix=prefix, max_new_tokens=1)
    with pytest.raises(ValueError, match="read by a model with other weights"):
        kj.generate(models[1], ids, lengths, prefix=prefix, max_new_tokens=1)
