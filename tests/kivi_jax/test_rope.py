"""Frequencies and rotation equal transformers', for every kind of scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.config import ModelConfig, RopeConfig
from kivi_jax.rope import apply_rope, rope_frequencies

CONTEXT = 64
HEAD_DIM = 32

ROPES = {
    "default": RopeConfig(),
    "theta": RopeConfig(theta=500000.0),
    "linear": RopeConfig(kind="linear", factor=4.0),
    "dynamic": RopeConfig(kind="dynamic", factor=2.0),
    "llama3": RopeConfig(kind="llama3", factor=8.0, original_max_position_embeddings=32),
    "llama3_bands": RopeConfig(
        kind="llama3",
        factor=32.0,
        low_freq_factor=0.5,
        high_freq_factor=8.0,
        original_max_position_embeddings=128,
    ),
    "yarn": RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=64),
    "yarn_betas": RopeConfig(
        kind="yarn",
        factor=16.0,
        theta=1e6,
        beta_fast=8.0,
        beta_slow=0.25,
        truncate=False,
        original_max_position_embeddings=4096,
    ),
    "yarn_attention_factor": RopeConfig(
        kind="yarn", factor=4.0, attention_factor=1.3, original_max_position_embeddings=64
    ),
    "yarn_mscale": RopeConfig(
        kind="yarn",
        factor=40.0,
        mscale=0.7,
        mscale_all_dim=1.0,
        original_max_position_embeddings=64,
    ),
    "yarn_no_room": RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=6),
}
# What transformers reads for each kind; it warns about the others.
FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def model_config(rope: RopeConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=16,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope=rope,
    )


def transformers_rope(rope: RopeConfig):
    """Transformers' rotary module for the same numbers."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta}
    parameters |= {name: getattr(rope, name) for name in FIELDS[rope.kind]}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name):
    expected = transformers_rope(ROPES[name])
    inv_freq, scaling = rope_frequencies(model_config(ROPES[name]), None)
    assert inv_freq.shape == (1, HEAD_DIM // 2)
    assert inv_freq.dtype == jnp.float32
    np.testing.assert_allclose(inv_freq[0], expected.inv_freq.numpy(), rtol=3e-7)
    assert scaling == pytest.approx(expected.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("tokens", [CONTEXT // 2, 3 * CONTEXT])
def test_rotation_equals_transformers(name, tokens):
    module = transformers_rope(ROPES[name])
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = np.random.default_rng(0).standard_normal((2, tokens, 3, HEAD_DIM), dtype=np.float32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (2, tokens))
    cos, sin = module(torch.from_numpy(x), torch.from_numpy(positions.copy()))
    expected, _ = apply_rotary_pos_emb(torch.from_numpy(x), torch.from_numpy(x), cos, sin, 2)

    lengths = jnp.full(2, tokens, jnp.int32)
    inv_freq, scaling = rope_frequencies(model_config(ROPES[name]), lengths)
    rotated = apply_rope(jnp.asarray(x), jnp.asarray(positions), inv_freq, scaling)
    np.testing.assert_allclose(rotated, expected.numpy(), atol=1e-4)


def test_dynamic_frequencies_are_a_rows_own():
    config = model_config(ROPES["dynamic"])
    lengths = jnp.array([5, CONTEXT, 3 * CONTEXT], jnp.int32)
    together, _ = jax.jit(rope_frequencies, static_argnums=0)(config, lengths)
    for row in range(3):
        alone, _ = rope_frequencies(config, lengths[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-6)
    at_rest, _ = rope_frequencies(config, None)
    np.testing.assert_allclose(together[:2], np.repeat(at_rest, 2, axis=0), rtol=3e-7)
    assert together[2, -1] < 0.5 * together[1, -1]


def test_the_rotated_product_depends_on_the_distance_only():
    inv_freq, scaling = rope_frequencies(model_config(ROPES["default"]), None)
    query, key = np.random.default_rng(1).standard_normal((2, 1, 1, 1, HEAD_DIM), dtype=np.float32)

    def product(query_position: int, key_position: int):
        rotated_query = apply_rope(query, jnp.array([[query_position]]), inv_freq, scaling)
        rotated_key = apply_rope(key, jnp.array([[key_position]]), inv_freq, scaling)
        return jnp.sum(rotated_query * rotated_key)

    query, key = jnp.asarray(query), jnp.asarray(key)
    np.testing.assert_allclose(product(9, 2), product(47, 40), atol=1e-4)
    assert abs(product(9, 2) - product(9, 3)) > 1e-3


def test_result_keeps_the_dtype_but_angles_do_not_lose_bits():
    inv_freq, scaling = rope_frequencies(model_config(ROPES["default"]), None)
    x = jnp.ones((1, 1, 1, HEAD_DIM), jnp.bfloat16)
    positions = jnp.array([[40001]])  # not a bfloat16 number
    half = apply_rope(x, positions, inv_freq, scaling)
    full = apply_rope(x.astype(jnp.float32), positions, inv_freq, scaling)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=1e-2)
