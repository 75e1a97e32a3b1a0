"""Whatever fields a config combines, a model reads prompts into a cache as it reads whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import kivi_jax as kj
from kivi_jax.config import ModelConfig, RopeConfig
from kivi_jax.model.llama import Llama
from tests.models import random_llama

PROMPT, STEPS, HEAD = 9, 8, 8
LENGTH = PROMPT + STEPS
FACTORS = {"short_factor": (1.0, 1.2, 1.5, 2.0), "long_factor": (1.0, 2.0, 3.0, 4.0)}
# What each kind needs. No row outgrows the context that `dynamic` and `longrope` look at: beyond it, one
# forward rotates all keys anew, and a cache keeps them as they were.
KINDS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 8},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 0.4},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": LENGTH},
}


@st.composite
def ropes(draw: st.DrawFn) -> dict:
    """Fields of any rotation of heads of `HEAD` channels."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    pairs = draw(st.sampled_from((2, 3, 4)))
    factors = {name: factor[:pairs] for name, factor in FACTORS.items()} if kind == "longrope" else {}
    theta, query_beta = draw(st.sampled_from((500.0, 10000.0))), draw(st.sampled_from((0.0, 0.3)))
    return (
        dict(kind=kind, theta=theta, partial=2 * pairs / HEAD, query_beta=query_beta) | KINDS[kind] | factors
    )


@st.composite
def configs(draw: st.DrawFn) -> dict:
    """Any fields of a model with two layers of two kinds at most.

    Values are made of them in the test: the check of types that tests run under looks at random elements of a
    tuple, and a strategy must not touch `random`.
    """
    groups, kv_heads = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2)))
    by_layer = st.sampled_from(((True,), (False,), (True, False), (False, True)))
    multiplier = st.sampled_from((1.0, 0.3))
    return dict(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=groups * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD,
        max_position_embeddings=LENGTH,
        rms_norm_eps=draw(st.sampled_from((0.0, 1e-5))),
        rope=draw(ropes()),
        attention_bias=draw(st.booleans()),
        output_bias=draw(st.sampled_from((None, False, True))),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        sliding_window=draw(st.sampled_from((None, 1, 5, LENGTH))),
        windowed=draw(by_layer),
        rotated=draw(by_layer),
        window_rope=draw(st.none() | ropes()),
        qk_norm=draw(st.sampled_from((None, "head", "projection"))),
        norm_placement=draw(st.sampled_from(("pre", "post", "both"))),
        norm_offset=draw(st.sampled_from((0.0, 1.0))),
        activation=draw(st.sampled_from(("silu", "gelu_tanh"))),
        embedding_multiplier=draw(st.sampled_from((1.0, 3.0))),
        attention_multiplier=draw(st.sampled_from((None, 0.2))),
        residual_multiplier=draw(multiplier),
        logits_multiplier=draw(multiplier),
        logits_softcap=draw(st.sampled_from((None, 2.0))),
    )


def random_model(config: ModelConfig) -> Llama:
    """A model none of whose parameters stands where it does nothing, as biases do at 0 and scales at 1."""
    model, random = nnx.clone(random_llama(config)), np.random.default_rng(0)

    def moved(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(np.asarray(leaf) + 0.2 * random.standard_normal(leaf.shape, np.float32))

    nnx.update(model, jax.tree.map(moved, nnx.state(model)))
    return model


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(fields=configs())
def test_a_prompt_and_steps_equal_one_forward_whatever_the_config(fields):
    """Of a ragged batch through the full cache, past the window where there is one."""
    ropes = {name: fields[name] and RopeConfig(**fields[name]) for name in ("rope", "window_rope")}
    config = ModelConfig(**fields | ropes)
    model, lengths = random_model(config), np.array([2, PROMPT])
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, LENGTH), np.int32)
    logits, cache = model.prefill(ids[:, :PROMPT], lengths, cache=kj.full(), capacity=LENGTH, block_tokens=4)
    got = [logits]
    for step in range(STEPS):
        logits, cache = model.decode(ids[np.arange(2), lengths + step], cache)
        got.append(logits)
    whole = np.asarray(model(jnp.asarray(ids)))
    for row, length in enumerate(lengths):
        expected = whole[row, length - 1 : length + STEPS]
        np.testing.assert_allclose(np.stack(got)[:, row], expected, atol=1e-4)
