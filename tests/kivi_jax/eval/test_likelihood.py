"""Log-likelihoods through the cache: a full one gives the model's own, a compressed one does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from kivi_jax.eval.likelihood import continuation_log_probs
from kivi_jax.generation.tokens import pad_prompts
from tests.models import config, random_llama

FULL = kj.full()
KIVI = kj.kivi(2, group_size=8, residual_length=8)


def pairs(seed=0, vocab=61, sizes=((1, 5), (9, 3), (30, 20), (17, 1))):
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(3, vocab, size).tolist() for size, _ in sizes]
    return contexts, [rng.integers(3, vocab, size).tolist() for _, size in sizes]


def test_under_a_full_cache_it_is_the_models_own():
    model = random_llama(config(num_layers=1))
    contexts, continuations = pairs()
    scored = continuation_log_probs(model, contexts, continuations, cache=FULL)
    texts = [context + continuation for context, continuation in zip(contexts, continuations, strict=True)]
    logits = model(jnp.asarray(pad_prompts(texts)[0]))
    log_probs, likeliest = np.asarray(jax.nn.log_softmax(logits)), np.asarray(jnp.argmax(logits, -1))
    for i, (context, continuation, row) in enumerate(zip(contexts, continuations, scored, strict=True)):
        at = np.arange(len(context), len(texts[i])) - 1
        np.testing.assert_allclose(row.log_probs, log_probs[i, at, continuation], atol=1e-5)
        np.testing.assert_array_equal(row.greedy, likeliest[i, at] == continuation)


def test_it_is_what_decoding_with_the_cache_gives():
    """The reference: prefill all but the context's last token, then one decoding step per token."""
    model = random_llama(config(num_layers=1))
    contexts, continuations = pairs()
    context, continuation = contexts[2], continuations[2]
    ids = context + continuation
    prefix = jnp.asarray([context[:-1]])
    _, held = model.prefill(prefix, jnp.asarray([len(context) - 1]), cache=KIVI, capacity=len(ids))
    expected = []
    for token, following in zip(ids[len(context) - 1 :], continuation, strict=False):
        logits, held = model.decode(jnp.asarray([token]), held)
        expected.append(float(jax.nn.log_softmax(logits)[0, following]))
    scored = continuation_log_probs(model, contexts, continuations, cache=KIVI)
    np.testing.assert_allclose(scored[2].log_probs, expected, atol=1e-5)


@pytest.mark.slow
def test_bits_change_it_even_for_one_token_after_a_long_context():
    """A prefill over context and continuation would give the same for all bits."""
    model = random_llama(config(num_layers=1))
    contexts, continuations = pairs(sizes=((64, 1),) * 16)

    def score(cache):
        rows = continuation_log_probs(model, contexts, continuations, cache=cache)
        return np.concatenate([row.log_probs for row in rows])

    full, *compressed = map(score, (FULL, *(kj.kivi(bits, 8, 8) for bits in (1, 8))))
    coarse, fine = (abs(log_probs - full).mean() for log_probs in compressed)
    assert 0 < 10 * fine < coarse


@pytest.mark.parametrize("cache", [FULL, pytest.param(KIVI, marks=pytest.mark.slow)])
def test_a_row_is_scored_the_same_alone_and_in_any_batch(cache):
    model = random_llama(config(num_layers=1))
    contexts, continuations = pairs()
    together = continuation_log_probs(model, contexts, continuations, cache=cache, rows=6)
    alone = continuation_log_probs(model, contexts[1:2], continuations[1:2], cache=cache)
    np.testing.assert_allclose(alone[0].log_probs, together[1].log_probs, atol=1e-5)
    assert len(together) == 4


def test_an_empty_continuation_or_context_is_refused():
    model = random_llama(config(num_layers=1))
    with pytest.raises(ValueError, match="at least one token"):
        continuation_log_probs(model, [[1]], [[]], cache=FULL)
    with pytest.raises(ValueError, match="no tokens"):
        continuation_log_probs(model, [[]], [[1]], cache=FULL)
