"""Rotary embeddings against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.config import RopeConfig
from kivi_jax.model.rope import apply_rope, rope_frequencies
from tests.models import config

KINDS = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=3.0),
    "llama3": dict(
        factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "yarn": dict(factor=4.0, original_max_position_embeddings=32),
    "yarn, mscale": dict(factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.3),
    "yarn, given factor": dict(factor=4.0, original_max_position_embeddings=32, attention_factor=1.7),
    "yarn, no truncation": dict(
        factor=16.0, original_max_position_embeddings=64, beta_fast=20.0, beta_slow=2.0, truncate=False
    ),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [5, 128, 300])
def test_frequencies_equal_transformers(torch, name, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, fields = name.split(",")[0], KINDS[name]
    ours = config(head_dim=32, rope=RopeConfig(kind=kind, theta=5000.0, **fields))
    theirs = LlamaConfig(
        head_dim=32,
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **fields},
    )
    frequencies, scaling = rope_frequencies(ours, ours.rope, jnp.asarray([length, length]))
    if kind == "default":
        expected, factor = 5000.0 ** (-np.arange(0, 32, 2) / 32), 1.0
    else:
        tensor, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
        expected = tensor.numpy()
    np.testing.assert_allclose(frequencies[0], expected, rtol=2e-6)
    assert scaling == pytest.approx(factor)


def test_dynamic_scaling_is_per_row():
    """A long neighbour does not change a row's frequencies."""
    rope = config(rope=RopeConfig(kind="dynamic", factor=2.0))
    together, _ = rope_frequencies(rope, rope.rope, jnp.asarray([10, 1000]))
    alone, _ = rope_frequencies(rope, rope.rope, jnp.asarray([10]))
    np.testing.assert_array_equal(together[0], alone[0])
    assert (together[1, 1:] < together[0, 1:]).all()


def test_rotation_keeps_norms_and_depends_on_distance_only():
    generator = np.random.default_rng(0)
    query, key = (jnp.asarray(generator.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    frequencies, scaling = rope_frequencies(config(head_dim=16), RopeConfig(), jnp.asarray([64]))

    def rotate(x, position):
        return apply_rope(x, jnp.asarray([[position]]), frequencies, scaling)

    np.testing.assert_allclose(jnp.linalg.norm(rotate(query, 40)), jnp.linalg.norm(query), rtol=1e-6)
    near = (rotate(query, 7) * rotate(key, 3)).sum()
    far = (rotate(query, 57) * rotate(key, 53)).sum()
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert rotate(query.astype(jnp.bfloat16), 7).dtype == jnp.bfloat16
