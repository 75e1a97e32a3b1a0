"""Memory plans: what a cache will weigh, from the shapes of the real arrays, without making any."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.segments import Segment
from kivi_jax.cache.strategy import CacheStrategy, KVCache, Prompt, cache_bytes
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama


def plan_cache(
    config: ModelConfig,
    cache: CacheStrategy | str,
    *,
    batch: int,
    context: int,
    dtype: DTypeLike,
    prompt_tokens: int | None = None,
) -> dict[str, int]:
    """`cache_bytes` of rows of `context` tokens, the first `prompt_tokens` (all) from a prompt.

    `cache` is a strategy, or its name ("kivi2").

    Raises:
        ValueError: a number is out of range, the name is unknown, or the strategy does not fit the model.
    """
    width = context if prompt_tokens is None else prompt_tokens
    if batch < 1 or not 0 < width <= context:
        raise ValueError(f"{batch=} must be positive, and the prompt's {width} tokens from 1 to {context=}")
    strategy = strategy_of(cache)
    strategy.check(config)
    return cache_bytes(abstract_cache(config, strategy, batch, width, capacity=context, dtype=dtype))


def abstract_cache(
    config: ModelConfig, strategy: CacheStrategy, batch: int, width: int, *, capacity: int, dtype: DTypeLike
) -> KVCache:
    """The shapes of a cache after prompts of `width` tokens. Layers of one kind are traced once."""
    shape = (batch, config.num_kv_heads, width, config.head_dim)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    heads = jax.ShapeDtypeStruct(shape, dtype)
    prompt = Prompt(heads, heads, jax.ShapeDtypeStruct(shape[:3], jnp.float32), lengths)
    kinds: dict[tuple[int | None, int], tuple[Segment, ...]] = {}

    def hold(layer: int) -> tuple[Segment, ...]:
        window, most = config.window_of(layer), strategy.prompt.most(layer, config.num_layers, width)
        if (window, most) not in kinds:
            kinds[window, most] = jax.eval_shape(
                functools.partial(
                    strategy.hold_prompt,
                    capacity=capacity,
                    window=window,
                    layer=layer,
                    layers=config.num_layers,
                ),
                prompt,
            )
        return kinds[window, most]

    return KVCache(tuple(hold(layer) for layer in range(config.num_layers)), lengths, strategy, capacity)


def largest_batch(
    config: ModelConfig,
    cache: CacheStrategy | str,
    *,
    context: int,
    dtype: DTypeLike,
    memory_bytes: int,
    prompt_tokens: int | None = None,
) -> int:
    """How many rows of `context` tokens fit into `memory_bytes`, weights included.

    Counted: the weights, the caches, and per row the final logits in float32. Prefill works on one row
    or many; its own peak depends on `block_tokens` and is not counted.

    Raises:
        ValueError: see `plan_cache`.
    """
    weights = parameter_count(config) * jnp.dtype(dtype).itemsize
    plan = plan_cache(config, cache, batch=1, context=context, dtype=dtype, prompt_tokens=prompt_tokens)
    row = plan["total"] + 4 * config.vocab_size
    return max(0, (memory_bytes - weights) // row)


@functools.cache
def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model, counted by shape. All layers have as many as the second."""

    def count(layers: int) -> int:
        shallow = dataclasses.replace(config, num_layers=layers)
        model = nnx.eval_shape(lambda: Llama(shallow, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))

    first = count(1)
    return first + (config.num_layers - 1) * (count(2) - first)
