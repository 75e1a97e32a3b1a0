"""How long reading a prompt takes, the first time and then: ours, and transformers' beside it."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from rich.table import Table

from kivi_jax.bench.peers import random_ids, torch_llama
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama

Record = dict[str, Any]

_MANY = 65536  # tokens from which on a prompt is read twice in all, not four times


def ours(
    config: ModelConfig, prompts: Sequence[tuple[int, int]], caches: Sequence[str], dtype: DTypeLike
) -> Iterator[Record]:
    """Prompts of (rows, tokens) through caches. Records have what `_timed` says and peak_bytes, so far."""
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    jax.block_until_ready(nnx.state(model))
    for rows, tokens in prompts:
        for cache in caches:
            read = functools.partial(_read, model, _ids(config, rows, tokens), cache)
            found = _timed(read, rows, tokens)
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            yield {"contender": cache, **found, "peak_bytes": peak}


def _read(model: Llama, ids: np.ndarray, cache: str) -> None:
    rows, tokens = ids.shape
    lengths = np.full(rows, tokens, np.int32)
    jax.block_until_ready(model.prefill(ids, lengths, cache=cache, capacity=tokens + 64))


def transformers(
    config: ModelConfig, prompts: Sequence[tuple[int, int]], dtype: DTypeLike
) -> Iterator[Record]:
    """The same by transformers' Llama and PyTorch's fused attention.

    In a process of its own: nothing here asks JAX for the GPU, which would take its memory.
    """
    model = torch_llama(config, dtype)
    for rows, tokens in prompts:
        ids = random_ids(model, config, rows, tokens)

        def read(ids: Any = ids) -> None:
            model(ids, use_cache=True, logits_to_keep=1).logits[0, 0, 0].item()  # waits for the device

        yield {"contender": "transformers", **_timed(read, rows, tokens)}


def _ids(config: ModelConfig, rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, tokens)).astype(np.int32)


def _timed(read: Callable[[], None], rows: int, tokens: int) -> Record:
    """Keys: case; first_s, with compiling; s, the best of what follows; tokens_per_s of that."""
    seconds = []
    for _ in range(2 if rows * tokens >= _MANY else 4):
        begin = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - begin)
    best = min(seconds[1:])
    case = f"{rows} x {tokens} prompt"
    return {"case": case, "first_s": seconds[0], "s": best, "tokens_per_s": rows * tokens / best}


def table(records: Sequence[Record]) -> Table:
    """Seconds of every prompt, and of transformers' where it was timed."""
    out = Table("prompt", "by", title="reading a prompt")
    for heading in ("first, s", "then, s", "tokens/s", "of transformers' time", "peak GB so far"):
        out.add_column(heading, justify="right")
    peer = {r["case"]: r["s"] for r in records if r["contender"] == "transformers"}
    for r in records:
        ratio = f"{r['s'] / peer[r['case']]:.2f}x" if r["case"] in peer else ""
        peak = f"{r['peak_bytes'] / 1e9:.1f}" if r.get("peak_bytes") else ""
        numbers = (f"{r['first_s']:.1f}", f"{r['s']:.3f}", f"{r['tokens_per_s']:,.0f}")
        out.add_row(r["case"].removesuffix(" prompt"), r["contender"], *numbers, ratio, peak)
    return out
