"""`kivi-jax eval frontier` and `select`: the tables by which to choose a cache."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from kivi_jax.cache.names import parse_cache
from kivi_jax.eval.command import Batch, Model, Out
from kivi_jax.eval.run import Run, read_text
from kivi_jax.options import DtypeOption, MeshOption

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
    peer: Annotated[
        list[str] | None,
        typer.Option(help="transformers' QuantizedCache, if torch is here: quanto:nbits=2; may be repeated."),
    ] = None,
    batch: Batch = 8,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """What caches cost against their bytes: perplexity, distance from the full cache, pass keys.

    Example:  kivi-jax eval frontier --model demo --data book.txt --out results
    """
    from kivi_jax.eval import peers
    from kivi_jax.eval.frontier import PASSKEYS, measure, read_texts
    from kivi_jax.eval.generating import predict
    from kivi_jax.eval.needle import build_samples
    from kivi_jax.generation.loading import dtype_name

    beside = {path.stem: path for path in data}
    if twice := next((path for path in data if beside[path.stem] != path), None):
        raise ValueError(f"{twice} and {beside[twice.stem]} have one name: rename one, to tell them apart")
    files = {name: read_text(str(path)) for name, path in beside.items()}
    run = Run("frontier", model, ", ".join(files), out, dtype, beside, mesh=mesh)
    theirs, theirs_by_name = peers.open_peers(model, dtype_name(dtype), peer) if peer else (None, {})
    llama, tokenizer = run.loaded
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
    asked = dataclasses.replace(run, name="needle", data="made-up text", beside={})

    def compute(name: str, path: Path, settings: dict[str, Any], progress: Progress) -> None:
        options: dict[str, Any] = dict(batch_size=batch, progress=progress)
        if new_cache := theirs_by_name.get(name):
            peers.measure(theirs, texts, new_cache=new_cache, path=path, settings=settings, **options)
            return
        measure(llama, texts, cache=name, path=path, settings=settings, **options)
        if samples:
            predict(
                llama,
                tokenizer,
                samples,
                cache=parse_cache(name),
                path=out / PASSKEYS / path.name,
                settings=asked.settings(max_new_tokens=8, depths=depths, cache=name),
                max_length=None,
                chat=False,
                **options,
            )

    run.compare(
        compute,
        ["full", *(cache or ("kivi4", "kivi4r", "kivi42r", "kivi2", "kivi2r"))],
        peers=list(theirs_by_name),
        length=length,
        windows=windows,
    )


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
    mesh: MeshOption = None,
) -> None:
    """What selectors of the output lose at equal budgets, in SCOPE's setting, with intervals.

    Example:  kivi-jax eval select --problems 96 --out results
    """
    from kivi_jax.demo import tasks
    from kivi_jax.eval.select import caches, measure

    run = Run("select", model, f"{questions} questions", out, dtype, mesh=mesh)
    llama, tokenizer = run.loaded
    made = {str(number): tasks.questions(number, questions) for number in range(seed, seed + problems)}
    longest = max(len(tokenizer(problem.answer)["input_ids"]) for problem in made.values())
    named = caches(longest, percent or [12, 25, 50], base)
    choices = {name: choice for choice, name in named.items()}

    def compute(name: str, path: Path, settings: dict[str, Any], progress: Progress) -> None:
        measure(
            llama,
            tokenizer,
            made,
            choice=choices[name],
            cache=name,
            path=path,
            settings=settings,
            batch_size=batch,
            max_new_tokens=longest,
            progress=progress,
        )

    run.compare(compute, list(choices), output_tokens=longest, base=base)
