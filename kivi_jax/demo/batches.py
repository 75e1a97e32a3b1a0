"""Tasks as arrays to train on: tokens, and how much each next token counts. Read `train.py` next."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from kivi_jax.demo import tasks
from kivi_jax.demo.tasks import Problem
from kivi_jax.demo.tokenizer import END, PAD


class Batch(NamedTuple):
    """Rows of prompt and answer, and the weight of predicting each token (0 outside of answers)."""

    tokens: Int[np.ndarray, "B T"]
    weights: Float[np.ndarray, "B T"]


SMALLEST = 72  # tokens of the smallest problem

# A problem of a seed that fills most of, and at most, a number of tokens, end of text included.
Sized = Callable[[int, int], Problem]


def _recall(seed: int, tokens: int) -> Problem:
    return tasks.recall(seed, min((tokens - 10) // 8, len(tasks.WORDS)))


def _questions(seed: int, tokens: int) -> Problem:
    count = min((tokens - 13) // 11, 99)
    return tasks.questions(seed, count, first=1 + seed % (100 - count))  # all numbers are seen early


def _copying(seed: int, tokens: int) -> Problem:
    return tasks.copying(seed, min((tokens - 9) // 2, len(tasks.WORDS)))


def _numbers(seed: int, tokens: int) -> Problem:
    return tasks.numbers(seed, min((tokens - 9) // 12, 32), tokens)


TASKS: dict[str, Sized] = {
    "passkey": tasks.passkey,
    "recall": _recall,
    "questions": _questions,
    "copying": _copying,
    "numbers": _numbers,
}


def training_batch(tokenizer: Tokenizer, step: int, *, rows: int, tokens: int, names: Sequence[str]) -> Batch:
    """The batch of a training step: the named tasks in turn, of random sizes up to `tokens`. Pure."""
    rng = np.random.default_rng(tasks.TRAINING_SEEDS + step)
    problems = (
        TASKS[names[(step * rows + row) % len(names)]](
            int(rng.integers(tasks.TRAINING_SEEDS, 2**62)),
            int(rng.integers(max(SMALLEST, tokens // 4), tokens + 1)),
        )
        for row in range(rows)
    )
    return encode(tokenizer, problems, tokens)


def encode(tokenizer: Tokenizer, problems: Iterable[Problem], tokens: int) -> Batch:
    """Problems right-padded to `tokens`. A row's weights sum to the square root of its answer's tokens.

    So long answers teach more than short ones, but do not drown them.

    Raises:
        ValueError: a problem has more than `tokens` tokens.
    """
    vocab = tokenizer.get_vocab()
    problems = list(problems)
    batch = Batch(
        np.full((len(problems), tokens), vocab[PAD], np.int32), np.zeros((len(problems), tokens), np.float32)
    )
    for problem, row, weights in zip(problems, batch.tokens, batch.weights, strict=True):
        ids = [*tokenizer.encode(problem.prompt + problem.answer).ids, vocab[END]]
        if len(ids) > tokens:
            raise ValueError(f"a problem has {len(ids)} tokens, more than {tokens}")
        answer = len(tokenizer.encode(problem.prompt).ids)
        row[: len(ids)] = ids
        weights[answer : len(ids)] = (len(ids) - answer) ** -0.5
    return batch
