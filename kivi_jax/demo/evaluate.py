"""What a model answers to a task's problems through one cache after another, and what each cache cost."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kivi_jax.cache.strategy import CacheStrategy, cache_bytes
from kivi_jax.demo.tasks import Problem
from kivi_jax.eval.statistics import bootstrap
from kivi_jax.generation.generate import generate
from kivi_jax.generation.tokens import Tokenizer, pad_prompts
from kivi_jax.model.llama import Llama


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One cache on one set of problems. Fractions are means over problems of the share of answer items."""

    cache: str
    right: float  # items that are right
    same: float  # items that are what the first cache gave
    row_bytes: int  # the cache of one prompt and its answer
    token_ms: float  # time per new token, prompts included and compilation left out
    interval: tuple[float, float]  # 95 % bootstrap interval of `right` over problems


@dataclasses.dataclass(frozen=True)
class Answers:
    """What came out of one cache."""

    texts: list[str]
    row_bytes: int
    token_ms: float


def compare(
    model: Llama,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    caches: Mapping[str, CacheStrategy],
    *,
    batch: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """The outcome of every cache in turn; the first is the one that `Outcome.same` compares with.

    `advance` is called after each of the `batches` of every cache.
    """
    first: list[str] = []
    for name, cache in caches.items():
        given = answer(model, tokenizer, problems, cache, batch=batch, advance=advance)
        first = first or given.texts
        references = [
            dataclasses.replace(problem, answer=text) for problem, text in zip(problems, first, strict=True)
        ]
        right, same = (
            bootstrap([problem.score(text) for problem, text in zip(asked, given.texts, strict=True)])
            for asked in (problems, references)
        )
        yield Outcome(
            name, right.mean, same.mean, given.row_bytes, given.token_ms, interval=(right.low, right.high)
        )


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    cache: CacheStrategy,
    *,
    batch: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> Answers:
    """Greedy answers, `batch` prompts at a time, none of more tokens than the longest right answer.

    The first batch is generated twice, so that compilation is not timed.
    """
    tokens, lengths = pad_prompts([tokenizer(problem.prompt)["input_ids"] for problem in problems])
    longest = max(len(tokenizer(problem.answer)["input_ids"]) for problem in problems)
    texts: list[str] = []
    seconds, new, row_bytes = 0.0, 0, 0
    for rows in batches(len(problems), batch):
        run = functools.partial(
            generate,
            model,
            jnp.asarray(tokens[rows]),
            jnp.asarray(lengths[rows]),
            cache=cache,
            max_new_tokens=longest,
        )
        if not texts:
            jax.block_until_ready(run())
        begin = time.perf_counter()
        out = jax.block_until_ready(run())
        seconds, new = seconds + time.perf_counter() - begin, new + int(out.lengths.sum())
        row_bytes = cache_bytes(out.cache)["total"] // len(rows)
        texts += [
            tokenizer.decode(row[:count].tolist(), skip_special_tokens=True)
            for row, count in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
        ]
        advance()
    return Answers(texts[: len(problems)], row_bytes, 1e3 * seconds / new)


def batches(problems: int, batch: int) -> list[list[int]]:
    """Indices of the problems in batches of one size: the last is filled up with the first problems."""
    batch = min(batch, problems)
    return [[i % problems for i in range(begin, begin + batch)] for begin in range(0, problems, batch)]
