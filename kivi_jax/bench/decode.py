"""Decoding speed of a whole model against its context, per cache, and against transformers on torch."""

import concurrent.futures
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from rich.console import Console
from rich.progress import track

from kivi_jax.bench.kernels import profiled
from kivi_jax.cache import CacheStrategy, KVCache, Prompt, cache_bytes
from kivi_jax.config import ModelConfig
from kivi_jax.console import format_bytes
from kivi_jax.llama import Llama
from kivi_jax.plan import largest_batch


class Result(NamedTuple):
    """One way to decode: the milliseconds of every step of the whole batch, and the cache's size."""

    name: str
    steps_ms: list[float]
    cache_bytes: int
    device_ms: float | None = None  # of a step: what a GPU works, without waiting for the host

    @property
    def median_ms(self) -> float:
        """Of all steps."""
        return statistics.median(self.steps_ms)

    def median_around(self, step: int, width: int = 100) -> float:
        """Of the `width` steps that end at `step`."""
        return statistics.median(self.steps_ms[max(0, step - width) : step])


def run(
    config: ModelConfig,
    strategies: Mapping[str, CacheStrategy],
    *,
    context: int,
    new_tokens: int,
    batch: int,
    dtype: DTypeLike,
    against_torch: bool,
) -> list[Result]:
    """Time `new_tokens` steps after `context` tokens; all ways take turns step by step.

    Our caches are filled with random keys and values (what they hold does not change the time); torch
    reads a random prompt.
    """
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    steppers: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # most of the time is the compiler's
        ours = pool.map(lambda s: _ours(model, s, context, new_tokens, batch, dtype), strategies.values())
        for name, (step, size) in zip(strategies, ours, strict=True):
            steppers[name], sizes[name] = step, size
    if against_torch:
        name = "transformers (torch)"
        steppers[name], sizes[name] = _transformers(config, context, batch)
    times = _take_turns(steppers, new_tokens, name="decoding")
    return [Result(name, samples, sizes[name], _device_ms(steppers[name])) for name, samples in times.items()]


def _device_ms(step: Callable[[], Any]) -> float | None:
    if jax.default_backend() != "gpu":
        return None
    return 1e3 * sum(profiled(step).values())


def throughput(
    config: ModelConfig,
    strategies: Mapping[str, CacheStrategy],
    *,
    context: int,
    new_tokens: int,
    dtype: DTypeLike,
    memory: int | None,
) -> Iterator[dict[str, Any]]:
    """Decode with as many rows as fit into `memory` bytes: by default 90 % of what the device has.

    Yields for each strategy: cache (its name), batch, ms (a step, median), tokens_per_s, cache_bytes,
    peak_bytes (the device's, where it counts them; it only ever grows from one strategy to the next).

    Raises:
        ValueError: the device does not say how much memory it has; or not one row fits.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if memory is None:
        if "bytes_limit" not in stats:
            raise ValueError("this device does not say how much memory it has: pass --memory, as in 4GiB")
        memory = int(0.9 * stats["bytes_limit"])
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    capacity = context + new_tokens + 8
    for name, strategy in strategies.items():
        batch = largest_batch(config, strategy, context=capacity, dtype=dtype, memory_bytes=memory)
        if batch == 0:
            raise ValueError(
                f"not one row of {capacity:,} tokens fits into {format_bytes(memory)} with {name}"
            )
        step, size = _ours(model, strategy, context, new_tokens, batch, dtype)
        (samples,) = _take_turns({name: step}, new_tokens, name=name).values()
        ms = statistics.median(samples)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        yield {
            "cache": name,
            "batch": batch,
            "ms": ms,
            "tokens_per_s": batch / ms * 1e3,
            "cache_bytes": size,
            "peak_bytes": peak,
        }
        del step  # and with it the cache, before the next one is made


def filled_cache(
    config: ModelConfig,
    strategy: CacheStrategy,
    *,
    context: int,
    capacity: int,
    batch: int,
    dtype: DTypeLike,
) -> KVCache:
    """A cache that holds `context` random tokens a row, the same in every row."""
    shape = (1, config.num_kv_heads, context, config.head_dim)

    @functools.partial(jax.jit, static_argnames="index")
    def layer(index: int) -> Any:
        key, value = jax.random.normal(jax.random.key(index), (2, *shape), dtype)
        weights = jax.random.uniform(jax.random.key(index), shape[:3])
        held = strategy.hold_prompt(
            Prompt(key, value, weights, jnp.full(1, context, jnp.int32)),
            capacity=capacity,
            window=config.sliding_window,
            layer=index,
            layers=config.num_layers,
        )
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, batch, axis=0), held)

    layers = tuple(layer(index) for index in range(config.num_layers))
    return KVCache(layers, jnp.full(batch, context, jnp.int32), strategy, capacity)


def _ours(
    model: Llama, strategy: CacheStrategy, context: int, new_tokens: int, batch: int, dtype: DTypeLike
) -> tuple[Callable[[], Any], int]:
    capacity = context + new_tokens + 8  # with the steps that warm up and that are profiled
    cache = filled_cache(model.config, strategy, context=context, capacity=capacity, batch=batch, dtype=dtype)
    token = jnp.zeros(batch, jnp.int32)
    compiled = _greedy_step.lower(model, token, cache).compile()

    def step() -> None:
        nonlocal cache, token
        token, cache = compiled(model, token, cache)
        jax.block_until_ready(token)

    return step, cache_bytes(cache)["total"]


@functools.partial(jax.jit, donate_argnames=("cache",))
def _greedy_step(model: Llama, token: Int[Array, "B"], cache: KVCache) -> tuple[Int[Array, "B"], KVCache]:
    logits, cache = model.decode(token, cache)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


def _transformers(config: ModelConfig, context: int, batch: int) -> tuple[Callable[[], Any], int]:
    """transformers' Llama of the same shape, float32, with its DynamicCache."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
    )
    model = AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, context))
    ids = next(model.parameters()).new_tensor(tokens).long()
    out = model(ids, use_cache=True, logits_to_keep=1)
    held = out.past_key_values
    size = sum(x.nbytes for layer in held.layers for x in (layer.keys, layer.values))
    token = out.logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal token
        out = model(token, past_key_values=held, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)

    return step, size


def _take_turns(
    steppers: Mapping[str, Callable[[], Any]], rounds: int, *, name: str
) -> dict[str, list[float]]:
    """Milliseconds of every round of every function; two rounds before them warm up."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in track(range(rounds + 2), name, console=Console(stderr=True), transient=True):
        for stepper, step in steppers.items():
            begin = time.perf_counter()
            step()
            times[stepper].append((time.perf_counter() - begin) * 1e3)
    return {stepper: samples[2:] for stepper, samples in times.items()}
