"""`kivi-jax inspect`: what caches of a model weigh, without making any."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kivi_jax import options
from kivi_jax.checks import warn_beyond
from kivi_jax.console import format_bytes, parse_bytes, print_table
from kivi_jax.options import Dtype
from kivi_jax.plan.shapes import SHAPES

if TYPE_CHECKING:
    from kivi_jax.cache.strategy import CacheStrategy
    from kivi_jax.config import ModelConfig


def inspect(
    model: Annotated[
        str,
        typer.Argument(help=f"A checkpoint's directory, a hub name, demo, or one of {', '.join(SHAPES)}."),
    ],
    context: Annotated[
        int | None,
        typer.Option(
            max=2**31 - 1,
            help="Tokens a row holds, prompt and output together; by default the model's, at most 32768.",
        ),
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Of those, the prompt's: all the others are generated. By default all.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(help="For the largest batch, weights included: 24GiB (if not given), 80GB."),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="A cache to plan for; may be repeated. By default full, kivi4, kivi2, kivi2+scope."
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and full-precision tokens.")] = Dtype.bfloat16,
    plot: Annotated[
        FilePath | None,
        typer.Option(help="Draw memory against context, up to --context, into this PNG file."),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Plan for each of many devices, as in data=2,model=4; none is needed."),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Plan memory: what each cache of a model weighs, and the batch that fits. Needs no weights.

    Example:  kivi-jax inspect llama-8b --context 131072 --batch 4 --memory 80GB

    Example:  kivi-jax inspect llama-8b --prompt 4096 --plot memory.png

    Example:  kivi-jax inspect llama-70b --mesh data=2,model=4 --memory 80GB
    """
    from convert import read_any_config
    from kivi_jax.cache.names import parse_cache
    from kivi_jax.mesh import read_mesh
    from kivi_jax.plan.memory import largest_batch, parameters_of_device, plan_cache

    if plot is not None:
        from kivi_jax.figures import check_place

        check_place(plot)
    config = SHAPES.get(model) or read_any_config(model)
    context = min(32768, config.context) if context is None else context
    warn_beyond(config.context, context)
    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi4", "kivi2", "kivi2+scope"]}
    limit = parse_bytes(memory or "24GiB")
    devices = None if mesh is None else read_mesh(mesh)
    weights = parameters_of_device(config, devices) * {"float32": 4}.get(dtype.value, 2)
    rows_of = f"{context:,} tokens x {batch} row{'s' * (batch > 1)}"
    each = "" if mesh is None else f", on each device of {mesh}"
    console = Console()
    table = Table(
        title=f"{rows_of}, {dtype.value}{each}; weights {format_bytes(weights)}",
        caption=f"max batch: rows of {context:,} tokens that fit into {memory or '24GiB'} beside the weights",
        padding=(0, 1 if console.width >= 110 else 0),  # nine columns, in 80 characters, too
    )
    table.add_column("cache", overflow="fold", min_width=11)  # names differ at their ends
    # From the last to the first they are left out in a narrow terminal.
    columns = ("total", "bytes/token", "smaller", "packed", "scales", "full prec.", "pool", "max batch")
    for column in columns:
        table.add_column(column.replace(" ", "\n").replace("/", "/\n"), justify="right", no_wrap=True)
    size = functools.partial(
        plan_cache,
        config,
        batch=batch,
        context=context,
        dtype=dtype.value,
        prompt_tokens=prompt,
        mesh=devices,
    )
    whole = size(parse_cache("full"))
    plans: dict[str, dict[str, int]] = {}
    for name, strategy in strategies.items():
        parts = size(strategy)
        rows = largest_batch(
            config,
            strategy,
            context=context,
            dtype=dtype.value,
            memory_bytes=limit,
            prompt_tokens=prompt,
            mesh=devices,
        )
        plans[name] = parts | {"max_batch": rows}
        table.add_row(
            name,
            format_bytes(parts["total"]),
            f"{parts['total'] / (context * batch):,.0f}",
            f"{whole['total'] / parts['total']:.2f}x",
            format_bytes(parts["packed"]),
            format_bytes(parts["scales"]),
            format_bytes(parts["rings"] + parts["dense"]),
            format_bytes(parts["pool"]),
            f"{rows:,}",
        )
    if as_json:
        plan = dict(model=model, context=context, prompt=prompt, batch=batch, dtype=dtype.value, mesh=mesh)
        typer.echo(json.dumps(plan | {"weights": weights, "memory": limit, "caches": plans}))
    else:
        print_table(console, table)
    if plot is not None:
        _plot_plan(
            plot,
            f"{model}, {dtype.value}",
            config,
            strategies,
            context=context,
            prompt=prompt,
            batch=batch,
            dtype=dtype.value,
            limit=None if memory is None else (f"{memory} less the weights", limit - weights),
        )


def _plot_plan(
    file: FilePath,
    title: str,
    config: "ModelConfig",
    strategies: "Mapping[str, CacheStrategy]",
    *,
    context: int,
    prompt: int | None,
    batch: int,
    dtype: str,
    limit: tuple[str, int] | None,
) -> None:
    from rich.progress import Progress

    from kivi_jax.figures import save_figure
    from kivi_jax.plan.plot import contexts_up_to, draw_memory, memory_curves

    contexts = contexts_up_to(context)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True) as bar:
        task = bar.add_task("planning", total=len(strategies))
        curves = memory_curves(
            config,
            strategies,
            contexts,
            batch=batch,
            dtype=dtype,
            prompt_tokens=prompt,
            advance=lambda: bar.advance(task),
        )
    title += f", {batch} row{'s' * (batch > 1)}"
    if prompt is not None:
        title += f": a prompt of {prompt:,} tokens, all others generated"
    save_figure(draw_memory(title, contexts, curves, limit=limit), file)
    errors.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
