"""Decoding speed of a whole model against its context, per cache, and against transformers on torch."""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from rich.console import Console
from rich.progress import track

from kivi_jax.bench.kernels import profiled
from kivi_jax.bench.peers import llama_config
from kivi_jax.cache.prompt_selectors import ExpectedQueries, Prompt
from kivi_jax.cache.strategy import CacheStrategy, KVCache, cache_bytes
from kivi_jax.config import ModelConfig
from kivi_jax.console import format_bytes
from kivi_jax.model.llama import Llama
from kivi_jax.plan.memory import largest_batch

PROGRAMS = 6  # of one cache: two warm up, three are timed and one is profiled


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
        capacity = room(context, new_tokens)

        def stepper(strategy: CacheStrategy) -> _Stepper:
            workload = Workload(config, strategy, context, capacity, batch, dtype)
            return _Stepper(workload.compile(model), model, workload)

        for name, ours in zip(strategies, pool.map(stepper, strategies.values()), strict=True):
            steppers[name], sizes[name] = ours, ours.cache_bytes
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
    batch: int | None = None,
    memory: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Decode with `batch` rows, by default as many as fit into `memory` bytes: 90 % of what the device has.

    Programs of `new_tokens` steps, a loop as in `generate`, are all compiled first, together; then the caches
    are filled and timed one after the other.

    Yields for each strategy: cache (its name), batch, ms (a step; the median of programs), device_ms (what
    the GPU works in one, where there is one), tokens_per_s, cache_bytes, peak_bytes (the device's, where it
    counts them; it only ever grows from one strategy to the next).

    Raises:
        ValueError: the device does not say how much memory it has; or not one row fits.
    """
    capacity = room(context, new_tokens, programs=PROGRAMS)

    def rows(name: str, strategy: CacheStrategy) -> int:
        return batch or most_rows(config, strategy, capacity=capacity, dtype=dtype, memory=memory, named=name)

    workloads = {
        name: Workload(config, strategy, context, capacity, rows(name, strategy), dtype)
        for name, strategy in strategies.items()
    }
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(0))

    def compiled(workload: Workload) -> Any:
        return workload.compile(model, steps=new_tokens)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(workloads, pool.map(compiled, workloads.values()), strict=True))
    for name, workload in workloads.items():
        stepper = _Stepper(programs[name], model, workload)
        (samples,) = _take_turns({name: stepper}, PROGRAMS - 3, name=name).values()
        ms = statistics.median(samples) / new_tokens
        device_ms = _device_ms(stepper)
        yield {
            "cache": name,
            "batch": workload.batch,
            "ms": ms,
            "device_ms": device_ms and device_ms / new_tokens,
            "tokens_per_s": workload.batch / ms * 1e3,
            "cache_bytes": stepper.cache_bytes,
            "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        }
        del stepper  # and with it the cache, before the next one is made


def most_rows(
    config: ModelConfig,
    strategy: CacheStrategy,
    *,
    capacity: int,
    dtype: DTypeLike,
    memory: int | None,
    named: str,
    mesh: Mesh | None = None,
) -> int:
    """How many rows fit into `memory` bytes of a device, by default 90 % of what it has.

    Raises:
        ValueError: the device does not say how much memory it has; or not one row fits with what is `named`.
    """
    limit = memory_of_device() if memory is None else memory
    rows = largest_batch(config, strategy, context=capacity, dtype=dtype, memory_bytes=limit, mesh=mesh)
    if rows == 0:
        raise ValueError(f"not one row of {capacity:,} tokens fits into {format_bytes(limit)} with {named}")
    return rows


def memory_of_device() -> int:
    """Nine tenths of the device's memory, in bytes.

    Raises:
        ValueError: the device does not say.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError("this device does not say how much memory it has: pass --memory, as in 4GiB")
    return int(0.9 * stats["bytes_limit"])


def room(context: int, new_tokens: int, *, programs: int = 1) -> int:
    """Slots for the context, the steps of all programs that are timed, and some more to warm up."""
    return context + programs * new_tokens + 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows that decode after `context` tokens each, in caches with room for `capacity`."""

    config: ModelConfig
    strategy: CacheStrategy
    context: int
    capacity: int
    batch: int
    dtype: DTypeLike

    def fill_cache(self) -> KVCache:
        """A cache that holds `context` random tokens a row, the same in every row."""
        config = self.config
        shape = (1, config.num_kv_heads, self.context, config.head_dim)

        def layer(index: int) -> Any:
            key, value = jax.random.normal(jax.random.key(index), (2, *shape), self.dtype)
            weights = jax.random.uniform(jax.random.key(index), shape[:3])
            queries = ExpectedQueries.zeros(1, config.num_heads, config.head_dim)
            held = self.strategy.hold_prompt(
                Prompt(key, value, weights, jnp.full(1, self.context, jnp.int32), queries),
                capacity=self.capacity,
                window=config.window_of(index),
                layer=index,
                layers=config.num_layers,
            )
            return jax.tree.map(lambda leaf: jnp.repeat(leaf, self.batch, axis=0), held)

        # Layers that are shaped alike are copies of one another: what they hold does not change the time.
        made: dict[Any, Any] = {}
        layers = []
        for index in range(config.num_layers):
            leaves, tree = jax.tree.flatten(jax.eval_shape(functools.partial(layer, index)))
            shapes = (tree, *((leaf.shape, leaf.dtype) for leaf in leaves))
            if shapes in made:
                layers.append(jax.tree.map(jnp.copy, made[shapes]))
            else:
                layers.append(made.setdefault(shapes, jax.jit(layer, static_argnums=0)(index)))
        lengths = jnp.full(self.batch, self.context, jnp.int32)
        return KVCache(tuple(layers), lengths, self.strategy, self.capacity)

    def compile(self, model: Llama, *, steps: int = 1) -> Any:
        """`greedy_steps` of so many steps, from the cache's shapes."""
        token = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        return greedy_steps.lower(model, token, jax.eval_shape(self.fill_cache), steps).compile()


class _Stepper:
    """Calls a compiled program again and again, with the cache that the last call returned, and awaits it."""

    def __init__(self, compiled: Any, model: Llama, workload: Workload) -> None:
        self.compiled, self.model = compiled, model
        self.cache = workload.fill_cache()
        self.token = jnp.zeros(workload.batch, jnp.int32)
        self.cache_bytes = cache_bytes(self.cache)["total"]

    def __call__(self) -> None:
        self.token, self.cache = self.compiled(self.model, self.token, self.cache)
        jax.block_until_ready(self.token)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def greedy_steps(
    model: Llama, token: Int[Array, "B"], cache: KVCache, steps: int = 1
) -> tuple[Int[Array, "B"], KVCache]:
    """The likeliest token of every row after so many steps, and the cache with those before it."""

    def advance(_: Any, state: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        logits, cache = model.decode(*state)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, steps, advance, (token, cache))


def _transformers(config: ModelConfig, context: int, batch: int) -> tuple[Callable[[], Any], int]:
    """transformers' Llama of the same shape, float32, with its DynamicCache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(llama_config(config)).eval().requires_grad_(False)
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
