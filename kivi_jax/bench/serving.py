"""What an engine gives where memory decides: requests a second, and what a row waits while others begin."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from kivi_jax.bench.engine import draw_requests
from kivi_jax.cache.strategy import CacheStrategy, full
from kivi_jax.console import format_bytes
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.programs import shapes
from kivi_jax.generation.requests import Request, Stats
from kivi_jax.generation.slots import BURST
from kivi_jax.model.llama import Llama
from pallas_kernels.pytree import tree_bytes

_WAITING = 16  # requests that are always there


class Saturated(NamedTuple):
    """Requests that ended, and tokens that were drawn, in some seconds in which others always waited."""

    name: str
    seconds: float
    requests: int
    new_tokens: int
    stats: Stats

    @property
    def requests_per_s(self) -> float:
        """Of those that ended."""
        return self.requests / self.seconds


def saturate(
    model: Llama,
    strategies: Mapping[str, CacheStrategy],
    *,
    memory_bytes: int,
    prompt: int,
    shared: int,
    shortest: int,
    longest: int,
    chunk_tokens: int,
    seconds: float,
) -> Iterator[Saturated]:
    """With each cache as many slots as fit into the memory. Prompts begin with the same `shared` tokens.

    Counting begins when as many requests have ended as there are slots.
    """
    vocab = model.config.vocab_size
    document = np.random.default_rng(1).integers(0, vocab, shared).tolist()
    own = draw_requests(vocab, requests=1024, prompt=prompt - shared, shortest=shortest, longest=longest)
    asked = [dataclasses.replace(request, tokens=(*document, *request.tokens)) for request in own]
    read, _ = shapes(model, full(), context=prompt, chunk_tokens=chunk_tokens)

    def measured(name: str, strategy: CacheStrategy) -> Saturated:
        """Of one cache; its engine is gone afterwards, and with it what the next one has the memory for."""
        with Engine(
            model,
            cache=strategy,
            memory_bytes=memory_bytes,
            context=prompt + longest,
            chunk_tokens=chunk_tokens,
            prefix_bytes=2 * tree_bytes(read) if shared else 0,
            progress=True,
        ) as engine:
            more = itertools.cycle(asked)
            begun = _keep_asking(engine, more, requests=engine.slots)
            done = _keep_asking(engine, more, requests=_ended(begun) + 1, seconds=seconds)
        took, requests = done.uptime_s - begun.uptime_s, _ended(done) - _ended(begun)
        return Saturated(name, took, requests, done.new_tokens - begun.new_tokens, done)

    yield from itertools.starmap(measured, strategies.items())


def _keep_asking(
    engine: Engine, more: Iterator[Request], *, requests: int = 0, seconds: float = 0.0
) -> Stats:
    """See to it that requests wait, until so many have ended and so long has passed; what there is then."""
    begin = engine.stats().uptime_s
    while _ended(stats := engine.stats()) < requests or stats.uptime_s - begin < seconds:
        for _ in range(_WAITING - stats.queued):
            engine.submit(next(more))
        time.sleep(0.01)
    return stats


def _ended(stats: Stats) -> int:
    return sum(stats.finished.values())


def saturated_table(results: Sequence[Saturated], *, title: str, caption: str) -> Table:
    """Requests and tokens a second, against those of the first cache."""
    out = Table("cache", title=title, caption=caption)
    for heading in ("slots", "a slot", "requests/s", f"vs {results[0].name}", "tokens/s", "compiled in"):
        out.add_column(heading, justify="right")
    for r in results:
        out.add_row(
            r.name,
            f"{r.stats.slots}",
            format_bytes(r.stats.cache_bytes // r.stats.slots),
            f"{r.requests_per_s:.2f}",
            f"{r.requests_per_s / results[0].requests_per_s:.2f}x",
            f"{r.new_tokens / r.seconds:,.0f}",
            f"{r.stats.compile_s:.0f} s",
        )
    return out


class Waits(NamedTuple):
    """Seconds between tokens of a row: alone, and while a prompt is read; and its last chunk's alone."""

    name: str
    alone_s: float
    reading_s: Sequence[float]
    chunk_s: float


def waits(
    model: Llama, strategies: Mapping[str, CacheStrategy], *, prompt: int, chunk_tokens: int
) -> Iterator[Waits]:
    """A row draws its tokens, and a long prompt arrives, of whose chunks the last one takes longest."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, prompt).tolist()
    long, shorter = (
        Request(tokens=tokens[:length], max_new_tokens=1, stop_ids=())
        for length in (prompt, prompt - chunk_tokens)
    )
    row = Request(tokens=tokens[:1], max_new_tokens=prompt - 1, stop_ids=())

    def measured(name: str, strategy: CacheStrategy) -> Waits:
        with Engine(
            model, cache=strategy, slots=2, context=prompt + 1, prefix_bytes=0, chunk_tokens=chunk_tokens
        ) as engine:
            chunk_s = _fastest(engine, long) - _fastest(engine, shorter)
            running = engine.submit(row)
            drawn = iter(running)
            before = [time.perf_counter() for _ in itertools.islice(drawn, 2 * BURST)]
            arrived = engine.submit(long)
            while not engine.stats().reading and not arrived.finished:  # the burst before it, which is alone
                time.sleep(1e-3)
            next(drawn)
            during = [time.perf_counter()]
            for _ in drawn:
                during.append(time.perf_counter())
                if arrived.finished:
                    break
            running.cancel()
        alone_s = (before[-1] - before[0]) / (len(before) - 1)  # bursts of tokens come at once
        return Waits(name, alone_s, np.diff(during).tolist(), chunk_s)

    yield from itertools.starmap(measured, strategies.items())


def _fastest(engine: Engine, request: Request) -> float:
    """Seconds of the faster of two times."""
    seconds: list[float] = []
    for _ in range(2):
        begin = time.perf_counter()
        engine.submit(request).result()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def waits_table(results: Sequence[Waits], *, title: str, caption: str) -> Table:
    """Milliseconds; the longest wait is to be no more than a token's and the last chunk's together."""
    out = Table("cache", title=title, caption=caption)
    for heading in ("a token", "while it is read", "at most", "the last chunk"):
        out.add_column(heading, justify="right")
    for r in results:
        milliseconds = (r.alone_s, statistics.median(r.reading_s), max(r.reading_s), r.chunk_s)
        out.add_row(r.name, *(f"{1e3 * x:.1f} ms" for x in milliseconds))
    return out
