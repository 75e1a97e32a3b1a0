"""`kivi-jax bench`: commands that print what the documentation quotes."""

import platform
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kivi_jax.console import format_bytes

bench = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)


@bench.callback()
def describe() -> None:
    """Say what is being measured on."""


@bench.command()
def decode(
    shape: Annotated[str, typer.Option(help="125m or llama-8b; random weights.")] = "125m",
    context: Annotated[int, typer.Option(help="Tokens in the cache when timing starts.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Steps to time.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    cache: Annotated[list[str] | None, typer.Option(help="Caches to compare; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 on an accelerator.")] = "float32",
    torch: Annotated[bool, typer.Option(help="Compare with transformers, where torch is installed.")] = True,
) -> None:
    """Time decoding steps of a whole model: full cache, KIVI, and transformers, taking turns.

    Example:  kivi-jax bench decode --context 8192 --no-torch
    """
    from kivi_jax.bench.decode import run
    from kivi_jax.bench.shapes import SHAPES
    from kivi_jax.names import parse_cache

    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi4", "kivi2"]}
    results = run(
        SHAPES[shape],
        strategies,
        context=context,
        new_tokens=new_tokens,
        batch=batch,
        dtype=dtype,
        against_torch=torch and _has_torch(),
    )
    table = Table(title=f"decode, {shape} {dtype}, {context:,} tokens x {batch} rows", caption=machine())
    for column in ("cache", "median ms/step", "fastest", "tokens/s", f"vs {results[0].name}", "cache size"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.median_ms:.2f}",
            f"{result.fastest_ms:.2f}",
            f"{batch * 1e3 / result.median_ms:.1f}",
            f"{results[0].median_ms / result.median_ms:.2f}x",
            format_bytes(result.cache_bytes),
        )
    Console().print(table)


def machine() -> str:
    """What this was measured on: device, cores, versions and date."""
    import datetime
    import os

    import jax

    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{device.device_kind}{cores}, jax {jax.__version__}, Python {platform.python_version()}, {today}"


def _has_torch() -> bool:
    from transformers.utils import import_utils

    return import_utils.is_torch_available()
