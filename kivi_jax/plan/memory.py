"""Memory plans: what a cache will weigh, from the shapes of the real arrays, without making any."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.prompt_selectors import ExpectedQueries, Prompt
from kivi_jax.cache.segments import Segment
from kivi_jax.cache.strategy import CacheStrategy, KVCache, cache_bytes
from kivi_jax.checks import floating, instance, real, whole
from kivi_jax.config import ModelConfig
from kivi_jax.mesh import ROWS
from kivi_jax.model.llama import abstract_llama
from kivi_jax.model.sharding import laid_out, part_of, rows_over, spec_of


def plan_cache(
    config: ModelConfig,
    cache: CacheStrategy | str,
    *,
    batch: int,
    context: int,
    dtype: DTypeLike,
    prompt_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, int]:
    """`cache_bytes` of rows of `context` tokens, the first `prompt_tokens` (all) from a prompt.

    `cache` is a strategy, or its name ("kivi2"). On a `mesh` it is what each device has of it.

    Raises:
        ValueError: a number is out of range, the name is unknown, or the strategy or the mesh does not fit
            the model.
    """
    _check_config(config)
    batch, context = whole("batch", batch), whole("context", context)
    width = context if prompt_tokens is None else whole("prompt_tokens", prompt_tokens)
    dtype = floating(dtype)
    if batch < 1 or not 0 < width <= context:
        raise ValueError(f"{batch=} must be positive, and the prompt's {width} tokens from 1 to {context=}")
    strategy = strategy_of(cache)
    strategy.check(config)
    if mesh is not None:
        parts = laid_out(mesh, config)
        config = part_of(config, parts)
        batch //= 1 if rows_over(parts, batch) is None else parts.shape[ROWS]
    hold = functools.partial(
        zero_cache, config, strategy, batch=batch, width=width, capacity=context, dtype=dtype
    )
    return cache_bytes(jax.eval_shape(hold))


def zero_cache(
    config: ModelConfig, strategy: CacheStrategy, *, batch: int, width: int, capacity: int, dtype: DTypeLike
) -> KVCache:
    """The cache of prompts of `width` tokens, all zeros, for its shapes: layers of one kind share arrays."""
    shape = (batch, config.num_kv_heads, width, config.head_dim)
    lengths = jnp.full(batch, width, jnp.int32)
    queries = ExpectedQueries.zeros(batch, config.num_heads, config.head_dim)
    prompt = Prompt(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[:3], jnp.float32), lengths, queries
    )
    hold = functools.partial(strategy.hold_prompt, prompt, capacity=capacity, layers=config.num_layers)
    kinds: dict[tuple[int | None, int], tuple[Segment, ...]] = {}
    layers: list[tuple[Segment, ...]] = []
    for layer in range(config.num_layers):
        kind = config.window_of(layer), strategy.prompt.most(layer, config.num_layers, width)
        if kind not in kinds:
            kinds[kind] = hold(window=kind[0], layer=layer)
        layers.append(kinds[kind])
    return KVCache(tuple(layers), lengths, strategy, capacity)


def largest_batch(
    config: ModelConfig,
    cache: CacheStrategy | str,
    *,
    context: int,
    dtype: DTypeLike,
    memory_bytes: int,
    prompt_tokens: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> int:
    """How many rows of `context` tokens fit into `memory_bytes` (of each device of a `mesh`), with weights.

    Counted: the weights, the caches, and per row the final logits in float32. Prefill works on one row
    or many; its own peak depends on `block_tokens` and is not counted.

    Raises:
        ValueError: see `plan_cache`.
    """
    _check_config(config)
    weights = parameters_of_device(config, mesh) * floating(dtype).itemsize
    if math.isnan(real("memory_bytes", memory_bytes)):
        raise ValueError(f"{memory_bytes=} must be a number of bytes")
    data = 1 if mesh is None else mesh.shape["data"]
    plan = plan_cache(
        config, cache, batch=data, context=context, dtype=dtype, prompt_tokens=prompt_tokens, mesh=mesh
    )
    row = plan["total"] + 4 * config.vocab_size
    return int(max(0, (memory_bytes - weights) // row)) * data


def parameters_of_device(config: ModelConfig, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Parameters that each device of a mesh has."""
    if mesh is None:
        return parameter_count(config)
    parts = laid_out(mesh, config)
    table = ("embed", "embedding") if config.tie_word_embeddings else ("lm_head", "kernel")
    is_spread = any(spec_of(table, config, parts))
    elsewhere = config.vocab_size * config.hidden_size * (1 - 1 / mesh.shape["model"]) if is_spread else 0
    return parameter_count(part_of(config, parts)) - int(elsewhere)


@functools.cache
def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model, counted by shape. All layers have as many as the second."""

    def count(layers: int) -> int:
        shallow = dataclasses.replace(config, num_layers=layers)
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_llama(shallow))))

    first = count(1)
    return first + (config.num_layers - 1) * (count(2) - first)


def _check_config(config: ModelConfig) -> None:
    instance("config", config, ModelConfig, "pass a model's, or one of kivi_jax.plan.shapes.SHAPES")
