"""A cache's name serves wherever a strategy does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from tests.models import AsciiTokenizer, config, random_llama

NAME = "kivi2:group_size=8:residual_length=8"
STRATEGY = kj.kivi(2, 8, 8)
MODEL_CONFIG = config(num_layers=1, vocab_size=128)


def generate(cache):
    tokens = jnp.ones((1, 3), jnp.int32)
    return kj.generate(
        random_llama(MODEL_CONFIG), tokens, jnp.asarray([3]), cache=cache, max_new_tokens=2, eos_ids=()
    )


def read_prefix(cache):
    return kj.read_prefix(random_llama(MODEL_CONFIG), AsciiTokenizer(), ["abc"], cache=cache)


def stream_tokens(cache):
    return list(
        kj.stream_tokens(random_llama(MODEL_CONFIG), [1, 2, 3], cache=cache, max_new_tokens=1, eos_ids=())
    )


def plan(cache):
    return kj.plan_cache(MODEL_CONFIG, cache, batch=1, context=32, dtype="float32")


def fit(cache):
    return kj.largest_batch(MODEL_CONFIG, cache, context=32, dtype="float32", memory_bytes=10**7)


def chat(cache):
    return kj.Chat(random_llama(MODEL_CONFIG), AsciiTokenizer(), cache=cache, context=32).cache


TAKERS = [generate, read_prefix, stream_tokens, plan, fit, chat]


@pytest.mark.parametrize("take", TAKERS, ids=lambda take: take.__name__)
def test_a_name_does_what_its_strategy_does(take):
    named, built = jax.tree.flatten(take(NAME)), jax.tree.flatten(take(STRATEGY))
    assert named[1] == built[1]
    for left, right in zip(named[0], built[0], strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("take", TAKERS, ids=lambda take: take.__name__)
def test_an_unknown_name_is_refused(take):
    with pytest.raises(ValueError, match="unknown cache 'kivi3': choose one of full, kivi1, kivi2"):
        take("kivi3")
