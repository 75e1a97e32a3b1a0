"""Memory plans: what a cache will weigh, from the shapes of the real arrays, without making any."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kivi_jax.cache import CacheStrategy, KVCache, cache_bytes
from kivi_jax.config import ModelConfig
from kivi_jax.llama import Llama


def plan_cache(
    config: ModelConfig, strategy: CacheStrategy, *, batch: int, context: int, dtype: DTypeLike
) -> dict[str, int]:
    """`cache_bytes` of a cache in which every row holds `context` tokens.

    Raises:
        ValueError: a number is not positive, or the strategy does not fit the model.
    """
    if batch < 1 or context < 1:
        raise ValueError(f"{batch=} and {context=} must be positive")
    strategy.check(config)

    def hold() -> KVCache:
        tokens = jnp.zeros((batch, config.num_kv_heads, context, config.head_dim), dtype)
        lengths = jnp.full(batch, context, jnp.int32)
        layer = strategy.hold_prompt(tokens, tokens, lengths, capacity=context, window=config.sliding_window)
        return KVCache((layer,) * config.num_layers, lengths, strategy, context)

    return cache_bytes(jax.eval_shape(hold))


def largest_batch(
    config: ModelConfig, strategy: CacheStrategy, *, context: int, dtype: DTypeLike, memory_bytes: int
) -> int:
    """How many rows of `context` tokens fit into `memory_bytes`, weights included.

    Counted: the weights, the caches, and per row the final logits in float32. Prefill works on one row
    or many; its own peak depends on `block_tokens` and is not counted.
    """
    weights = parameter_count(config) * jnp.dtype(dtype).itemsize
    row = plan_cache(config, strategy, batch=1, context=context, dtype=dtype)["total"]
    row += 4 * config.vocab_size
    return max(0, (memory_bytes - weights) // row)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model, counted by shape."""

    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
