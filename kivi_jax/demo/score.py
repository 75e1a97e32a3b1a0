"""How well a model does the demo's tasks: `python -m kivi_jax.demo.score --cache full,kivi2`.

Answers are generated greedily through the cache, on held-out seeds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kivi_jax.cache import CacheStrategy
from kivi_jax.demo import MODEL, tasks
from kivi_jax.demo.tasks import Problem
from kivi_jax.llama import Llama
from kivi_jax.loading import load
from kivi_jax.names import parse_cache
from kivi_jax.text import Tokenizer, complete

SUITE: dict[str, Callable[[int], Problem]] = {
    "passkey, 1k tokens": partial(tasks.passkey, tokens=1024),
    "passkey, 2k tokens": partial(tasks.passkey, tokens=2048),
    "recall of 32 pairs": partial(tasks.recall, pairs=32),
    "recall of 64 pairs": partial(tasks.recall, pairs=64),
    "30 questions": partial(tasks.questions, count=30),
    "copying 64 words": partial(tasks.copying, words=64),
}


def score(
    model: Llama, tokenizer: Tokenizer, cache: CacheStrategy, problems: Sequence[Problem], *, batch: int = 8
) -> float:
    """The mean score of `problems`, in [0, 1]; see `Problem.score`."""
    longest = max(tasks.count_tokens(problem.answer) for problem in problems)
    answer = partial(complete, model, tokenizer, cache=cache, max_new_tokens=longest + 1)
    return float(np.mean(tasks.evaluate(answer, problems, batch=batch)))


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint's directory.")] = str(MODEL),
    cache: Annotated[str, typer.Option(help="Caches, separated by commas.")] = "full",
    problems: Annotated[int, typer.Option(help="Held-out problems per task.")] = 100,
) -> None:
    """Print the score of every task with every cache, in percent."""
    llama, tokenizer = load(model)
    if tokenizer is None:
        raise typer.BadParameter(f"{model} has no tokenizer")
    names = cache.split(",")
    table = Table("task", *names)
    for task, make in SUITE.items():
        held_out = [make(seed) for seed in range(problems)]
        scores = (score(llama, tokenizer, parse_cache(name), held_out) for name in names)
        table.add_row(task, *(f"{100 * value:.1f}" for value in scores))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
