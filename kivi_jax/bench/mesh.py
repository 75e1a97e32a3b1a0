"""Decoding steps on meshes of this machine's devices: how much sooner, and what their sums cost."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int
from rich.table import Table

from convert.hf import abstract_parameters, build
from kivi_jax.bench.decode import Workload, greedy_steps, most_rows, room
from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.config import ModelConfig
from kivi_jax.console import format_bytes
from kivi_jax.mesh import add_parts, make_mesh
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import bytes_of_device, fits, over_mesh, part_of, shape_of, spec_of, split

Record = dict[str, Any]

TIMED = 3  # programs, after one that warms up


def meshes_here(config: ModelConfig) -> list[tuple[int, int]]:
    """`data` and `model` of one device, of all as `model` in powers of two, and of all as `data`."""
    count = jax.device_count()
    powers = [1 << power for power in range(count.bit_length())]
    return [(1, model) for model in powers if fits(config, model)] + [(count, 1)] * (count > 1)


def run(
    config: ModelConfig,
    strategy: CacheStrategy,
    meshes: Sequence[tuple[int, int]],
    *,
    context: int,
    new_tokens: int,
    batch: int | None,
    dtype: str,
    memory: int | None = None,
) -> Iterator[Record]:
    """Time rows of `context` tokens on each mesh of (data, model): `new_tokens` steps are a program.

    `batch` None: as many rows on each mesh as fit into `memory` bytes of a device (90 % of what it has).

    Yields for each: data, model, batch, ms (a step; the median of programs), tokens_per_s, sums_ms (of a
    step's all-reduces alone, one after the other), weights_bytes and cache_bytes (of one device).

    Raises:
        ValueError: see `make_mesh` and `split`; or the device does not say how much memory it has; or not
            one row fits.
    """
    capacity = room(context, new_tokens, programs=TIMED + 1)
    for data, size in meshes:
        mesh = make_mesh(data=data, model=size)
        rows = batch or most_rows(
            config,
            strategy,
            capacity=capacity,
            dtype=dtype,
            memory=memory,
            named=f"{data=}, model={size}",
            mesh=mesh,
        )
        workload = Workload(config, strategy, context, capacity, rows, dtype)
        yield {"data": data, "model": size, "batch": rows, **_timed(workload, mesh, new_tokens)}


def _timed(workload: Workload, mesh: Mesh, new_tokens: int) -> Record:
    """What `run` says of one mesh; nothing stays on its devices."""
    config, batch = workload.config, workload.batch
    model = random_model(config, str(workload.dtype), mesh)
    state = _fill(model, jnp.zeros(batch, jnp.int32), workload)
    found = {"weights_bytes": bytes_of_device(nnx.state(model)), "cache_bytes": bytes_of_device(state[1])}
    ms = _median_ms(lambda state: greedy_steps(model, *state, new_tokens), state) / new_tokens
    sums = 0.0
    if mesh.shape["model"] > 1:
        stream = jnp.zeros((batch, config.hidden_size), workload.dtype)
        sums = _median_ms(lambda stream: _sums(model, stream, new_tokens), stream) / new_tokens
    return found | {"ms": ms, "tokens_per_s": batch / ms * 1e3, "sums_ms": sums}


def random_model(config: ModelConfig, dtype: str, mesh: Mesh) -> Llama:
    """A model that no device ever has whole, of small random numbers."""
    mesh = split(mesh, config)
    parameters: dict[tuple[str, ...], jax.Array] = {}
    for path, leaf in abstract_parameters(config, dtype).items():
        shape = shape_of(path, leaf.shape, config, mesh)
        parameters[path] = _draw(shape, dtype, NamedSharding(mesh, spec_of(path, config, mesh)))()
    return build(config, parameters, dtype, mesh)


@functools.cache
def _draw(shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Callable[[], Array]:
    return jax.jit(
        lambda: 0.02 * jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype)), out_shardings=sharding
    )


@functools.partial(jax.jit, static_argnames="workload")
def _fill(model: Llama, token: Int[Array, "B"], workload: Workload) -> tuple[Int[Array, "B"], KVCache]:
    """The tokens on the mesh, and a cache of the workload, each device's part made by it."""

    def fill(part: Llama, _: None, token: Array) -> tuple[Array, KVCache]:
        config = part_of(part.config, part.mesh)
        return token, dataclasses.replace(workload, config=config, batch=token.shape[0]).fill_cache()

    return over_mesh(fill, model, None, token)


@functools.partial(jax.jit, static_argnames="steps")
def _sums(model: Llama, stream: Array, steps: int) -> Array:
    """As many sums over devices as so many steps have, of as many numbers, and nothing else."""

    def add(part: Llama, _: None, stream: Array) -> tuple[Array, None]:
        count = 2 * part.config.num_layers * steps
        return jax.lax.fori_loop(0, count, lambda _, x: add_parts(x) * x.dtype.type(0.5), stream), None

    return over_mesh(add, model, None, stream)[0]


def _median_ms(call: Callable[[Any], Any], state: Any) -> float:
    samples: list[float] = []
    for _ in range(TIMED + 1):
        begin = time.perf_counter()
        state = jax.block_until_ready(call(state))
        samples.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(samples[1:])


def table(records: Sequence[Record], title: str, caption: str) -> Table:
    """A line per mesh, beside the first."""
    out = Table("mesh", title=title, caption=caption)
    for heading in ("rows", "ms/step", "tokens/s", "vs first", "all-reduces, ms", "weights", "cache"):
        out.add_column(heading, justify="right")
    for record in records:
        out.add_row(
            f"data={record['data']},model={record['model']}",
            str(record["batch"]),
            f"{record['ms']:.2f}",
            f"{record['tokens_per_s']:.0f}",
            f"{record['tokens_per_s'] / records[0]['tokens_per_s']:.2f}x",
            f"{record['sums_ms']:.2f} ({record['sums_ms'] / record['ms']:.0%})",
            format_bytes(record["weights_bytes"]),
            format_bytes(record["cache_bytes"]),
        )
    return out
