"""Samplers against plain NumPy readings of their definitions, and against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.generation.sampling import Greedy, Sample, Sampler, keep_likely, make_sampler, penalize

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 40)).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def top_k(logits, k):
    """All but the k largest are left out."""
    return np.where(np.isin(np.arange(len(logits)), np.argsort(-logits)[:k]), logits, -np.inf)


def top_p(logits, p):
    """Take tokens from the most likely on, until their probabilities reach p."""
    probability, total, kept = softmax(logits), 0.0, np.full_like(logits, -np.inf)
    for token in np.argsort(-logits):
        if total >= p:
            break
        kept[token] = logits[token]
        total += probability[token]
    return kept


def min_p(logits, p):
    probability = softmax(logits)
    return np.where(probability >= p * probability.max(), logits, -np.inf)


def keep(**filters):
    of_all = {
        name: jnp.asarray([number])
        for name, number in (dict(top_k=0, top_p=1.0, min_p=0.0) | filters).items()
    }
    return np.asarray(keep_likely(jnp.asarray(LOGITS), **of_all))


def draws(sampler, logits, count, seed=0):
    """`count` tokens drawn for the same logits [V]."""
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(sampler(jnp.broadcast_to(jnp.asarray(logits), (count, len(logits))), keys))


def test_greedy_takes_the_lowest_id_of_equals():
    logits = jnp.asarray([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert Greedy()(logits, None).tolist() == [1, 0]


@pytest.mark.parametrize("k", [1, 7, 39])
def test_top_k(k):
    np.testing.assert_array_equal(keep(top_k=k), [top_k(row, k) for row in LOGITS])


@pytest.mark.parametrize("k", [0, 40, 1000])
def test_top_k_of_none_or_all_tokens_changes_nothing(k):
    np.testing.assert_array_equal(keep(top_k=k), LOGITS)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.9, 0.99])
def test_top_p(p):
    np.testing.assert_array_equal(keep(top_p=p), [top_p(row, p) for row in LOGITS])


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p(p):
    np.testing.assert_array_equal(keep(min_p=p), [min_p(row, p) for row in LOGITS])


def test_each_filter_applies_to_what_the_one_before_left():
    filters = dict(top_k=12, top_p=0.8, min_p=0.25)
    expected = [min_p(top_p(top_k(row, 12), 0.8), 0.25) for row in LOGITS]
    np.testing.assert_array_equal(keep(**filters), expected)
    # Top-p of all tokens keeps more than top-p of the 12 left: the order shows.
    assert (np.isfinite(keep(**filters)) != np.isfinite([top_k(top_p(r, 0.8), 12) for r in LOGITS])).any()


def test_temperature_goes_from_greedy_to_uniform():
    cold = Sample(temperature=1e-6)
    assert (draws(cold, LOGITS[0], 64) == LOGITS[0].argmax()).all()
    counts = np.bincount(draws(Sample(temperature=1e6), LOGITS[0], 8000), minlength=40)
    assert abs(counts - 200).max() < 5 * np.sqrt(200)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sample(), LOGITS[1]),
        (Sample(temperature=2.5), LOGITS[1] / 2.5),
        (Sample(temperature=0.7, top_k=9), top_k(LOGITS[1] / 0.7, 9)),
        (Sample(temperature=3.0, top_p=0.9), top_p(LOGITS[1] / 3, 0.9)),
        (Sample(temperature=2.0, min_p=0.1), min_p(LOGITS[1] / 2, 0.1)),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampler, expected):
    count, probability = 20_000, softmax(expected.astype(np.float64))
    seen = np.bincount(draws(sampler, LOGITS[1], count), minlength=40)
    assert not seen[probability == 0].any()
    kept = probability > 0
    chi_square = ((seen - count * probability)[kept] ** 2 / (count * probability[kept])).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_rows_draw_depends_on_its_own_key_only():
    sampler, keys = Sample(temperature=2.0, top_p=0.95), jax.random.split(jax.random.key(3), 5)
    together = sampler(jnp.asarray(LOGITS), keys)
    for row in range(5):
        assert sampler(jnp.asarray(LOGITS[row : row + 1]), keys[row : row + 1])[0] == together[row]
    assert len(set(draws(sampler, LOGITS[0], 50).tolist())) > 5  # and keys matter


def test_repetition_penalty_equals_transformers(torch):
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = np.random.default_rng(1).integers(0, 40, (5, 12))
    seen = np.zeros((5, 40), bool)
    seen[np.arange(5)[:, None], ids] = True
    for penalty in (0.7, 1.3):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(LOGITS))
        got = penalize(jnp.asarray(LOGITS), jnp.asarray(seen), penalty)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_repetition_penalty_makes_seen_tokens_less_likely():
    got = penalize(jnp.asarray([[2.0, -2.0, 2.0, -2.0]]), jnp.asarray([[True, True, False, False]]), 2.0)
    assert got.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_sampling_without_a_key_is_refused():
    with pytest.raises(ValueError, match="needs a PRNG key: pass key"):
        Sample()(jnp.asarray(LOGITS), None)


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0.0),
        dict(temperature=-1.0),
        dict(temperature=1e-38),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(min_p=-0.1),
        dict(min_p=1.1),
        dict(repetition_penalty=0.0),
        dict(top_p=float("nan")),
        dict(top_k=2**31),
    ],
    ids=str,
)
def test_out_of_range_is_refused(fields):
    """Also where the temperature makes most of them idle."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sample(**fields)
    usual = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    if fields != dict(temperature=0.0):
        with pytest.raises(ValueError, match=next(iter(fields))):
            make_sampler(**usual | fields)


def test_greedy_refuses_a_penalty_that_is_not_positive():
    with pytest.raises(ValueError, match=r"repetition_penalty=-1\.0 must be positive"):
        Greedy(repetition_penalty=-1.0)


def test_samplers_are_hashable_values():
    assert {Sample(top_k=3), Sample(top_k=3), Greedy(), Greedy()} == {Sample(top_k=3), Greedy()}
    assert isinstance(Greedy(), Sampler)
    assert isinstance(Sample(), Sampler)
