"""Small models for tests: random ones of any shape, and the recorded trained one."""

from functools import cache
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from kivi_jax import Llama, ModelConfig


def config(**changes) -> ModelConfig:
    """A tiny grouped-query Llama; `changes` override its fields."""
    fields = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    return ModelConfig(**(fields | changes))


@cache
def random_llama(model_config: ModelConfig, seed: int = 0) -> Llama:
    """A float32 model of the given shape with random weights."""
    return Llama(model_config, rngs=nnx.Rngs(seed))


@cache
def stories(shared: Path) -> Llama:
    """The trained stories260K in float32."""
    from convert.hf import load_hf

    return load_hf(shared / "models" / "stories260K", dtype=jnp.float32)
