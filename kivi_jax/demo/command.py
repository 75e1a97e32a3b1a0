"""`kivi-jax demo` and `kivi-jax eval`: the demo's tasks, on this or any model, through any caches."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kivi_jax.bench.command import machine
from kivi_jax.cache.names import parse_cache
from kivi_jax.console import format_bytes, print_table
from kivi_jax.demo import tasks
from kivi_jax.outputs import check_place, whole

if TYPE_CHECKING:
    from kivi_jax.cache.strategy import CacheStrategy
    from kivi_jax.demo.evaluate import Outcome
    from kivi_jax.demo.tasks import Problem
    from kivi_jax.generation.tokens import Tokenizer
    from kivi_jax.model.llama import Llama

_BEGIN = b'{\n  "model": '  # of the results as JSON
evaluation = typer.Typer(help="Measure what a model gets right, through any caches.", no_args_is_help=True)

# The demo's questions and answers have 160 and 210 tokens: a residual of 32 packs most of them.
DEMO_CACHES = {
    "full": "full",
    "kivi4": "kivi4:residual_length=32",
    "kivi2": "kivi2:residual_length=32",
    "scope": "scope:window=32:recent=16",
    "kivi2+scope": "kivi2+scope:residual_length=32:window=32:recent=16",
}

ModelOption = Annotated[str, typer.Option("--model", help="A directory, a hub name, or demo.")]
CachesOption = Annotated[
    list[str] | None, typer.Option("--cache", help="As for generate; may be repeated. full is always first.")
]
ProblemsOption = Annotated[int, typer.Option(min=1, help="How many.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the first problem; trained on: 1,000,000 and up.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Prompts at a time.")]
OutOption = Annotated[Path | None, typer.Option(help="Write the results there, too, as JSON.")]


@evaluation.command()
def passkey(
    model: ModelOption = "demo",
    cache: CachesOption = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Of a problem; may be repeated.")] = None,
    problems: ProblemsOption = 32,
    seed: SeedOption = 0,
    batch: BatchOption = 8,
    out: OutOption = None,
) -> None:
    """A five-digit key hidden in filler, asked for at the end.

    Example:  kivi-jax eval passkey --tokens 1024 --tokens 2048 --cache kivi2
    """
    makers = {
        f"passkey, {size:,} tokens": lambda seed, size=size: tasks.passkey(seed, size)
        for size in tokens or [1024]
    }
    _evaluate(makers, model, cache, range(seed, seed + problems), batch, out)


@evaluation.command()
def recall(
    model: ModelOption = "demo",
    cache: CachesOption = None,
    pairs: Annotated[list[int] | None, typer.Option(help="Of a problem; may be repeated.")] = None,
    problems: ProblemsOption = 32,
    seed: SeedOption = 0,
    batch: BatchOption = 8,
    out: OutOption = None,
) -> None:
    """Words with a number each, then all numbers asked for in another order.

    Example:  kivi-jax eval recall --pairs 64 --cache kivi2 --cache kivi4
    """
    makers = {
        f"recall of {size} pairs": lambda seed, size=size: tasks.recall(seed, size) for size in pairs or [32]
    }
    _evaluate(makers, model, cache, range(seed, seed + problems), batch, out)


@evaluation.command()
def longgen(
    model: ModelOption = "demo",
    cache: CachesOption = None,
    questions: Annotated[list[int] | None, typer.Option(help="Of a problem; may be repeated.")] = None,
    problems: ProblemsOption = 32,
    seed: SeedOption = 0,
    batch: BatchOption = 8,
    out: OutOption = None,
) -> None:
    """Numbered questions, all answered in one long output.

    Example:  kivi-jax eval longgen --cache scope:window=32:recent=16
    """
    makers = {
        f"{size} questions": lambda seed, size=size: tasks.questions(seed, size) for size in questions or [30]
    }
    _evaluate(makers, model, cache, range(seed, seed + problems), batch, out)


def demo(
    problems: Annotated[int, typer.Option(min=1, help="Of each task.")] = 8,
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("kivi-jax-demo.png"),
) -> None:
    """Let the model in this package find and compute things through five caches, and compare what they cost.

    Example:  kivi-jax demo
    """
    from kivi_jax import figures
    from kivi_jax.demo.plot import save_plot
    from kivi_jax.generation.loading import load_with_tokenizer

    console = Console()
    figures.check_place(plot)
    suite = {
        "passkey, 1,024 tokens": [tasks.passkey(seed, 1024) for seed in range(problems)],
        "30 questions": [tasks.questions(seed, 30) for seed in range(problems)],
    }
    llama, tokenizer = load_with_tokenizer("demo")
    caches = {name: parse_cache(text) for name, text in DEMO_CACHES.items()}
    measured = {
        title: _measure(title, llama, tokenizer, made, caches, batch=8) for title, made in suite.items()
    }
    for title, outcomes in measured.items():
        print_table(console, _table(title, suite[title], tokenizer, outcomes))
    save_plot(plot, llama.config, caches, measured)
    console.print(f"Memory against length, and accuracy against memory: {plot}", style="dim", markup=False)


def _evaluate(
    makers: Mapping[str, Callable[[int], "Problem"]],
    model: str,
    caches: Sequence[str] | None,
    seeds: range,
    batch: int,
    out: Path | None,
) -> None:
    """Print a table per size; write all of them to `out`."""
    from kivi_jax.generation.loading import load_with_tokenizer

    if out is not None:
        check_place(out, _BEGIN)
    names = dict.fromkeys(["full", *(caches or ["kivi4", "kivi2"])])
    strategies = {name: parse_cache(name) for name in names}
    suite = {title: [make(seed) for seed in seeds] for title, make in makers.items()}
    llama, tokenizer = load_with_tokenizer(model)
    results: dict[str, list[dict[str, object]]] = {}
    for title, made in suite.items():
        outcomes = _measure(title, llama, tokenizer, made, strategies, batch=batch)
        print_table(Console(), _table(title, made, tokenizer, outcomes))
        results[title] = [dataclasses.asdict(outcome) for outcome in outcomes]
    if out is not None:
        record = {
            "model": model,
            "seeds": [seeds.start, seeds.stop],
            "machine": machine(),
            "results": results,
        }
        with whole(out) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n")


def _measure(
    title: str,
    model: "Llama",
    tokenizer: "Tokenizer",
    problems: Sequence["Problem"],
    caches: Mapping[str, "CacheStrategy"],
    *,
    batch: int,
) -> list["Outcome"]:
    from kivi_jax.demo.evaluate import batches, compare

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=len(caches) * len(batches(len(problems), batch)))
        return list(
            compare(model, tokenizer, problems, caches, batch=batch, advance=lambda: bar.advance(task))
        )


def _table(
    title: str, problems: Sequence["Problem"], tokenizer: "Tokenizer", outcomes: Sequence["Outcome"]
) -> Table:
    longest = max(len(tokenizer(problem.prompt)["input_ids"]) for problem in problems)
    table = Table(
        title=f"{title}: {len(problems)} problems, prompts of up to {longest:,} tokens",
        caption=f"per prompt: cache of a prompt and its answer; ms: prompts included; {machine()}",
    )
    table.add_column("cache", overflow="fold")
    for column in ("right", "as full", "per prompt", "smaller", "ms/token"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.cache,
            f"{100 * outcome.right:.1f} %",
            f"{100 * outcome.same:.1f} %",
            format_bytes(outcome.row_bytes),
            f"{outcomes[0].row_bytes / outcome.row_bytes:.2f}x",
            f"{outcome.token_ms:.2f}",
        )
    return table
