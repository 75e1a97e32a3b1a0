"""The Llama/Mistral decoder: parameters, and the three ways to run it. Read `generate.py` next.

Modules hold `nnx.Param`s and static config, are built once and then only read. The cache is an ordinary
pytree that goes in and comes out: nothing here is mutated, so plain `jax.jit` is safe.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kivi_jax.config import ModelConfig


class Attention(nnx.Module):
    """Projections of grouped-query attention; what is attended to is the cache's business."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Create the four projections, kernels [in, out]."""
        linear = _linear(config.attention_bias, dtype, rngs)
        self.query = linear(config.hidden_size, config.num_heads * config.head_dim)
        self.key = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.value = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.output = linear(config.num_heads * config.head_dim, config.hidden_size)


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Create the three projections, kernels [in, out]."""
        linear = _linear(config.mlp_bias, dtype, rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)


class Layer(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Create the two norms and the two sub-blocks."""
        self.attention_norm = _norm(config, dtype, rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)


class Llama(nnx.Module):
    """A Llama-like decoder (Llama, Mistral): see `ModelConfig` for what varies."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Create randomly initialized parameters of `dtype`; converters overwrite them."""
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List[Layer](Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers))
        self.norm = _norm(config, dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(False, dtype, rngs)(config.hidden_size, config.vocab_size)


def _linear(use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
    return lambda inputs, outputs: nnx.Linear(
        inputs, outputs, use_bias=use_bias, param_dtype=dtype, rngs=rngs
    )


def _norm(config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=dtype, rngs=rngs)
