"""`kivi-jax cache`: read a document once, keep its cache on disk, and see what is kept."""

import sys
from pathlib import Path as FilePath
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kivi_jax import options
from kivi_jax.commands.hints import as_prompt, reading
from kivi_jax.console import compare_bytes, format_bytes, print_table

cache_files = typer.Typer(
    help="""Read a document once, and ask about it often.

    First:  kivi-jax cache save ./llama-8b novel.txt novel.prefix

    Then:  kivi-jax generate ./llama-8b "Who is the butler?" --prefix novel.prefix
    """,
    no_args_is_help=True,
)


@cache_files.command()
def save(
    model: options.ModelArgument,
    prompt_file: Annotated[str, typer.Argument(help="The text to read; - reads it from standard input.")],
    destination: Annotated[FilePath, typer.Argument(help="Directory to write; complete or absent.")],
    cache: options.CacheOption = options.DEFAULT_CACHE,
    chat: options.ChatOption = False,
    system: options.SystemOption = None,
    dtype: options.DtypeOption = None,
    mesh: options.MeshOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at the destination.")] = False,
) -> None:
    """Read a text into a cache and write that to disk.

    With --chat it begins a message, in which questions that follow go on: for instruct models.

    Example:  kivi-jax cache save ./llama-8b book.txt book.prefix --cache kivi42r

    Example:  kivi-jax cache save ./llama-8b novel.txt novel.prefix --chat
    """
    import jax

    from convert.files import check_space, replacing, writing
    from convert.hub import resolve
    from kivi_jax.cache.names import parse_cache
    from kivi_jax.cache.strategy import cache_bytes
    from kivi_jax.generation.loading import open_model
    from kivi_jax.generation.prefix_files import MANIFEST, write_prefix
    from kivi_jax.generation.text import read_prefix

    strategy = parse_cache(cache)
    text = sys.stdin.read() if prompt_file == "-" else _read_text(FilePath(prompt_file))
    errors = Console(stderr=True)
    sources = [resolve(model), FilePath(prompt_file)]
    with replacing(
        destination, manifest=MANIFEST, overwrite=overwrite, sources=sources
    ) as partial:  # before anything is computed
        llama, tokenizer = open_model(model, dtype, mesh)
        prompt = as_prompt(tokenizer, text, chat=chat, system=system)
        with reading(f"{len(text):,} characters"):
            prefix = jax.block_until_ready(read_prefix(llama, tokenizer, [prompt], cache=strategy))
        check_space(partial, cache_bytes(prefix.cache)["total"], destination)
        with errors.status("writing"), writing(destination):
            write_prefix(partial, prefix, llama)
    _print_info(destination, errors)


@cache_files.command()
def info(path: Annotated[FilePath, typer.Argument(help="What kivi-jax cache save wrote.")]) -> None:
    """Say what a saved prefix holds. Needs no model.

    Example:  kivi-jax cache info novel.prefix
    """
    _print_info(path, Console())


def _read_text(file: FilePath) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): convert it first") from error


def _print_info(path: FilePath, console: Console) -> None:
    from kivi_jax.cache.strategy import full
    from kivi_jax.generation.prefix_files import read_manifest
    from kivi_jax.plan.memory import plan_cache

    saved = read_manifest(path)
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    whole = plan_cache(
        saved.config, full(), batch=len(saved.tokens), context=max(saved.tokens), dtype=saved.dtype
    )["total"]
    table = Table("", escape(str(path)), title="prefix", show_header=False)
    table.add_row("of", "a conversation, whose user goes on" if saved.turn else "text")
    table.add_row("cache", saved.cache)
    table.add_row("tokens", ", ".join(f"{count:,}" for count in saved.tokens))
    table.add_row("in memory", compare_bytes(saved.bytes["total"], whole))
    table.add_row("of that", _parts(saved.bytes))
    table.add_row("on disk", format_bytes(disk))
    table.add_row("model", f"{saved.model}, {saved.config.num_layers} layers, {saved.dtype}")
    print_table(console, table)


def _parts(held: dict[str, int]) -> str:
    return ", ".join(
        f"{name} {format_bytes(count)}" for name, count in held.items() if count and name != "total"
    )
