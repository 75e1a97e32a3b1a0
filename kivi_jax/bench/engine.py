"""Requests of mixed lengths: through an engine's slots, and in batches that wait for their longest row."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.console import format_bytes
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.generate import generate
from kivi_jax.generation.requests import Finished, Request, Stats
from kivi_jax.generation.tokens import pad_prompts
from kivi_jax.model.llama import Llama


class Result(NamedTuple):
    """Seconds that all requests took: in batches, as `generate` answers them, and through an engine."""

    name: str
    new_tokens: int
    batches_s: float
    engine_s: float
    stats: Stats
    same: int  # requests with the same tokens both ways
    requests: int


def draw_requests(vocab: int, *, requests: int, prompt: int, shortest: int, longest: int) -> list[Request]:
    """Random prompts of up to `prompt` tokens; of new ones the logarithms are uniformly distributed."""
    random = np.random.default_rng(0)
    new = np.exp(random.uniform(np.log(shortest), np.log(longest), requests)).round().astype(int)
    lengths = random.integers(1, prompt + 1, requests)
    return [
        Request(tokens=random.integers(0, vocab, length).tolist(), max_new_tokens=int(count), stop_ids=())
        for length, count in zip(lengths, new, strict=True)
    ]


def run(
    model: Llama,
    strategies: Mapping[str, CacheStrategy],
    *,
    slots: int,
    requests: int,
    prompt: int,
    shortest: int,
    longest: int,
    rounds: int,
) -> Iterator[Result]:
    """The same requests both ways, taking turns; the median round of each. Nothing is compiled meanwhile."""
    asked = draw_requests(
        model.config.vocab_size, requests=requests, prompt=prompt, shortest=shortest, longest=longest
    )
    total = sum(request.max_new_tokens for request in asked)

    def measured(name: str, strategy: CacheStrategy) -> Result:
        """Of one cache; its engine is gone afterwards, and with it what the next one has the memory for."""
        batches = list(_batches(model, strategy, asked, slots))  # compiles
        chunk = min(256, prompt)
        with Engine(
            model, cache=strategy, slots=slots, context=prompt + longest, prefix_bytes=0, chunk_tokens=chunk
        ) as engine:
            seconds: list[tuple[float, float]] = []
            done: list[Finished] = []
            for _ in track(range(rounds), name, console=Console(stderr=True), transient=True):
                begin = time.perf_counter()
                batches = list(_batches(model, strategy, asked, slots))
                middle = time.perf_counter()
                done = engine.complete(asked)
                seconds.append((middle - begin, time.perf_counter() - middle))
            alone = [tokens for batch in batches for tokens in batch]
            same = sum(tuple(one) == two.tokens for one, two in zip(alone, done, strict=True))
            batches_s, engine_s = np.median(seconds, axis=0).tolist()
            return Result(name, total, batches_s, engine_s, engine.stats(), same, requests)

    yield from itertools.starmap(measured, strategies.items())


def _batches(
    model: Llama, strategy: CacheStrategy, asked: Sequence[Request], rows: int
) -> Iterator[list[list[int]]]:
    """Rows' tokens, batch by batch in order of arrival, each as long as its longest row."""
    for first in range(0, len(asked), rows):
        batch = asked[first : first + rows]
        tokens, lengths = _padded(asked, batch)
        longest = max(request.max_new_tokens for request in batch)
        out = generate(model, tokens, lengths, cache=strategy, max_new_tokens=longest, eos_ids=())
        found = jax.device_get(out.tokens)
        yield [row[: request.max_new_tokens].tolist() for row, request in zip(found, batch, strict=False)]


def _padded(
    asked: Sequence[Request], batch: Sequence[Request]
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    """The batch's prompts, as wide as the widest of all."""
    tokens, lengths = pad_prompts([request.tokens for request in [*batch, *asked]])
    return tokens[: len(batch)], lengths[: len(batch)]


def table(results: Sequence[Result], *, title: str, caption: str) -> Table:
    """Tokens a second both ways, and what the caches weigh."""
    out = Table("cache", title=title, caption=caption)
    for heading in ("batches, tokens/s", "engine, tokens/s", "ratio", "slots weigh", "full", "same tokens"):
        out.add_column(heading, justify="right")
    for r in results:
        out.add_row(
            r.name,
            f"{r.new_tokens / r.batches_s:,.0f}",
            f"{r.new_tokens / r.engine_s:,.0f}",
            f"{r.batches_s / r.engine_s:.2f}x",
            format_bytes(r.stats.cache_bytes),
            format_bytes(r.stats.full_cache_bytes),
            f"{r.same} of {r.requests}",
        )
    return out
