"""What a saved prefix saves: loading it against reading the prompt again."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import track

from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.config import ModelConfig
from kivi_jax.generation.prefix import prefill
from kivi_jax.generation.prefix_files import load_prefix, save_prefix
from kivi_jax.model.llama import Llama


class Result(NamedTuple):
    """Seconds: of the first time, compilation included, and the median of the others."""

    name: str
    first_read_s: float
    read_s: float
    save_s: float
    first_load_s: float
    load_s: float
    disk_bytes: int


def run(
    config: ModelConfig,
    strategies: Mapping[str, CacheStrategy],
    *,
    context: int,
    repeats: int,
    dtype: DTypeLike,
) -> list[Result]:
    """Read, save and load `context` random tokens with each strategy."""
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, context))
    tokens, lengths = jnp.asarray(ids, jnp.int32), jnp.asarray([context], jnp.int32)
    rounds = track(strategies.items(), "reading and loading", console=Console(stderr=True), transient=True)
    return [_measure(name, model, tokens, lengths, strategy, repeats) for name, strategy in rounds]


def _measure(
    name: str, model: Llama, tokens: jax.Array, lengths: jax.Array, strategy: CacheStrategy, repeats: int
) -> Result:
    def read() -> Any:
        return prefill(model, tokens, lengths, cache=strategy, capacity=tokens.shape[1])

    with tempfile.TemporaryDirectory() as directory:
        path = FilePath(directory) / "prefix"
        reads = [_seconds(read) for _ in range(repeats + 1)]
        prefix = jax.block_until_ready(read())
        save = _seconds(lambda: save_prefix(path, prefix, model))
        loads = [_seconds(lambda: load_prefix(path, model)) for _ in range(repeats + 1)]
        disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Result(
        name, reads[0], statistics.median(reads[1:]), save, loads[0], statistics.median(loads[1:]), disk
    )


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
