"""What caches hold while decoding, against the weights of full attention."""

import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from kivi_jax.eval.kept import attention_weights, drift, held_tokens, kept_weight
from tests.models import config, random_llama

PROMPT, CONTINUATION = list(range(3, 15)), list(range(20, 36))


@pytest.fixture(scope="module")
def model():
    return random_llama(config(sliding_window=None))


@pytest.fixture(scope="module")
def weights(model):
    return attention_weights(model, jnp.asarray(PROMPT + CONTINUATION))


def test_weights_are_causal_and_sum_to_one(weights):
    assert np.allclose(np.asarray(weights).sum(-1), 1, atol=1e-5)
    assert not np.triu(np.asarray(weights), 1).any()


@pytest.mark.parametrize("cache", [kj.full(), kj.kivi(2, 8, 8)], ids=["full", "kivi2"])
def test_caches_that_keep_all_hold_all(model, weights, cache):
    held = held_tokens(model, PROMPT, CONTINUATION, cache)
    total = len(PROMPT) + len(CONTINUATION)
    expected = np.tri(total, dtype=bool)[len(PROMPT) :]
    np.testing.assert_array_equal(held, np.broadcast_to(expected, held.shape))
    np.testing.assert_allclose(kept_weight(weights, held), 1, atol=1e-5)


def test_slide_holds_the_prompt_the_newest_and_no_more_than_its_window(model, weights):
    held = held_tokens(model, PROMPT, CONTINUATION, kj.scope(decode=kj.Slide(window=6, recent=3)))
    assert held[..., : len(PROMPT)].all()
    decoded = held[..., len(PROMPT) :]
    # Its own token joins the window only after it has attended.
    assert decoded.sum(-1).max() == 6 + 1
    for step in range(len(CONTINUATION)):
        assert decoded[:, :, step, max(0, step - 3) : step + 1].all()
    share = kept_weight(weights, held)
    assert (share < 1 + 1e-5).all()
    assert share.min() < 1


def test_a_unified_cache_lets_go_of_the_prompt(model):
    cache = kj.scope(decode=kj.H2O(budget=14, recent=3))
    held = held_tokens(model, PROMPT, CONTINUATION, cache)
    assert held[:, :, -1].sum(-1).max() <= 14 + 1
    assert not held[:, :, -1, : len(PROMPT)].all()


def test_a_prompt_that_was_selected_from_is_refused(model):
    cache = kj.scope(prompt=kj.SnapKV(budget=8, window=4), decode=kj.Slide(window=6, recent=3))
    with pytest.raises(ValueError, match="take prompt=keepall"):
        held_tokens(model, PROMPT, CONTINUATION, cache)


def test_drift_counts_the_heaviest_that_stay():
    prompt, steps = 4, 3
    weights = np.zeros((1, 1, prompt + steps, prompt + steps), np.float32)
    weights[..., :prompt, 0] = 1  # while reading, token 0 is heaviest, then 1
    weights[..., :prompt, 1] = 0.5
    weights[..., prompt:, 2] = 1  # while decoding, token 2 is, then 0
    weights[..., prompt:, 0] = 0.5
    overlap = drift(jnp.asarray(weights), prompt, 2)
    # Of the last two queries' weight: steps see {0, 2} or {0, 2}, of which one was heavy before.
    np.testing.assert_allclose(overlap, [0.5, 0.5, 0.5])
