"""Perplexity by position: a long text in windows, every token scored through the cache.

A window begins with the tokens that the tokenizer puts before any text; its other tokens are decoded one by
one with the true token given, so a token at position p was predicted from a cache of p tokens.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.eval.jobs import Record, finish, in_batches
from kivi_jax.eval.likelihood import continuation_log_probs
from kivi_jax.eval.statistics import Estimate, bootstrap, difference
from kivi_jax.model.llama import Llama

FIELDS = ("nll",)  # of every record
Window = tuple[str, list[int], list[int]]  # its name, its context, and the tokens that are scored


def read_windows(tokenizer: Any, text: str, length: int) -> list[Window]:
    """`text` in windows of `length` tokens that do not overlap; a shorter rest is left out.

    Where the tokenizer puts nothing before a text, a window's first token is its context.

    Raises:
        ValueError: the text is shorter than one window, or `length` is less than 2.
    """
    prefix = tokenizer("")["input_ids"]
    ids = tokenizer(text)["input_ids"]
    ids = ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
    if length < 2 or len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens: pass --length from 2 to that many, not {length}")
    chunks = [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)]
    return [
        (str(index), prefix or chunk[:1], chunk if prefix else chunk[1:])
        for index, chunk in enumerate(chunks)
    ]


def score_windows(
    model: Llama,
    windows: Sequence[Window],
    *,
    cache: CacheStrategy,
    path: Path,
    settings: Record,
    batch_size: int,
    progress: Progress,
) -> list[Record]:
    """A record per window with the negative log-probability of each of its tokens, in nats.

    Raises:
        ValueError: see `jobs.finish`.
    """

    rows = min(batch_size, len(windows))

    def compute(batch: Sequence[Window]) -> list[Record]:
        _, contexts, continuations = zip(*batch, strict=True)
        scored = continuation_log_probs(model, contexts, continuations, cache=cache, rows=rows)
        return [{"nll": [round(-float(value), 6) for value in row.log_probs]} for row in scored]

    return finish(
        path,
        settings,
        in_batches(windows, batch_size),
        compute,
        identify=lambda window: window[0],
        progress=progress,
        fields=FIELDS,
    )


def perplexity(records: Sequence[Mapping[str, Any]]) -> Estimate:
    """exp of the mean negative log-probability; the interval is over windows."""
    return Estimate(*map(_exp, bootstrap(_means(records))))


def relative_change(records: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> Estimate:
    """How much higher the perplexity is than the baseline's, 0.01 for 1 %; the interval is over windows."""
    return Estimate(*(_exp(value) - 1 for value in difference(_means(records), _means(baseline))))


def by_position(records: Sequence[Mapping[str, Any]], points: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Positions (the middle of each of `points` equal stretches) and the perplexity there."""
    nll = np.array([record["nll"] for record in records]).mean(0)
    stretches = np.array_split(np.arange(nll.size), min(points, nll.size))
    return (
        np.array([stretch.mean() for stretch in stretches]),
        np.array([_exp(float(nll[stretch].mean())) for stretch in stretches]),
    )


def _exp(nats: float) -> float:
    """Of a model that is sure of what is wrong it may be more than a float can hold."""
    return math.inf if nats > 709 else math.exp(nats)


def _means(records: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(np.mean(record["nll"])) for record in records]
