"""`kivi-jax eval frontier` and `select`: the tables by which to choose a cache."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from kivi_jax.cache.names import parse_cache
from kivi_jax.eval.command import Batch, Model, Out, dtype_name, read_text, show_progress, show_report
from kivi_jax.options import DtypeOption

choosing = typer.Typer()


@choosing.command()
def frontier(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="A text file; may be repeated.")],
    out: Out,
    cache: Annotated[
        list[str] | None,
        typer.Option("--cache", help="May be repeated; by default KIVI's, plain and r."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 16,
    passkey: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt with a pass key; may be repeated.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="Pass keys of each length.")] = 96,
    batch: Batch = 8,
    dtype: DtypeOption = None,
) -> None:
    """What caches cost against their bytes: perplexity, distance from the full cache, pass keys.

    Example:  kivi-jax eval frontier --model ./llama-8b --data book.txt --out out
    """
    from kivi_jax.eval.frontier import PASSKEYS, measure, read_texts
    from kivi_jax.eval.generating import predict
    from kivi_jax.eval.needle import build_samples
    from kivi_jax.generation.loading import open_model

    names = list(dict.fromkeys(["full", *(cache or ("kivi4", "kivi4r", "kivi2", "kivi2r"))]))
    llama, tokenizer = open_model(model, dtype)
    for name in names:  # a mistake in the last one should not cost the time of the first
        parse_cache(name).check(llama.config)
    files = {path.stem: read_text(str(path)) for path in data}
    texts = read_texts(tokenizer, files, length=length, windows=windows)
    depths = math.gcd(problems, 8)
    samples = build_samples(
        tokenizer,
        lengths=passkey or [],
        depths=depths,
        repeats=problems // depths,
        haystack=None,
        max_new_tokens=8,
    )
    common = dict(model=model, dtype=dtype_name(dtype))
    shared = dict(eval="frontier", data=", ".join(files), length=length, windows=windows) | common
    asked = dict(eval="needle", data="made-up text", max_new_tokens=8, depths=depths) | common
    with show_progress() as progress:
        for name in names:
            file = f"{name.replace(':', ',')}.jsonl"
            options: dict[str, Any] = dict(batch_size=batch, progress=progress)
            settings = shared | {"cache": name}
            measure(llama, texts, cache=name, path=out / "frontier" / file, settings=settings, **options)
            if samples:
                predict(
                    llama,
                    tokenizer,
                    samples,
                    cache=parse_cache(name),
                    path=out / PASSKEYS / file,
                    settings=asked | {"cache": name},
                    max_length=None,
                    chat=False,
                    **options,
                )
    show_report([out / "frontier"])


@choosing.command()
def select(
    out: Out,
    model: Model = "demo",
    percent: Annotated[
        list[int] | None,
        typer.Option(help="Of the output that is kept; may be repeated; by default 12, 25, 50."),
    ] = None,
    base: Annotated[str, typer.Option(help="scope, or kivi2+scope and its fields.")] = "scope",
    questions: Annotated[int, typer.Option(min=1, help="Of a problem.")] = 30,
    problems: Annotated[int, typer.Option(min=1, help="How many.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Of the first problem.")] = 0,
    batch: Batch = 32,
    dtype: DtypeOption = None,
) -> None:
    """What selectors of the output lose at equal budgets, in SCOPE's setting, with intervals.

    Example:  kivi-jax eval select --problems 96 --out out
    """
    from kivi_jax.demo import tasks
    from kivi_jax.eval.select import caches, measure
    from kivi_jax.generation.loading import open_model

    llama, tokenizer = open_model(model, dtype)
    made = {str(number): tasks.questions(number, questions) for number in range(seed, seed + problems)}
    longest = max(len(tokenizer(problem.answer)["input_ids"]) for problem in made.values())
    named = caches(longest, percent or [12, 25, 50], base)
    for name in named.values():
        parse_cache(name).check(llama.config)
    settings: dict[str, Any] = dict(
        eval="select", model=model, data=f"{questions} questions", output_tokens=longest, base=base
    )
    settings |= dict(dtype=dtype_name(dtype))

    with show_progress() as progress:
        for choice, name in named.items():
            measure(
                llama,
                tokenizer,
                made,
                choice=choice,
                cache=name,
                path=out / "select" / f"{name.replace(':', ',')}.jsonl",
                settings=settings | {"cache": name},
                batch_size=batch,
                max_new_tokens=longest,
                progress=progress,
            )
    show_report([out / "select"])
