"""`kivi-jax bench`: commands that print what the documentation quotes."""

import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kivi_jax.cache.names import parse_cache
from kivi_jax.console import format_bytes, parse_bytes, print_table
from kivi_jax.outputs import check_place, whole
from kivi_jax.plan.shapes import SHAPES

if TYPE_CHECKING:
    from kivi_jax.config import ModelConfig
    from pallas_kernels.quantized_attention.cases import Case

bench = typer.Typer(
    help="""Measure speed and memory on this machine.

    Example:  kivi-jax bench decode --context 2048 --no-torch
    """,
    no_args_is_help=True,
)

ShapeOption = Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}; random weights.")]
CachesOption = Annotated[list[str] | None, typer.Option(help="A cache to compare; may be repeated.")]
DtypeOption = Annotated[str, typer.Option(help="float32, or bfloat16 on an accelerator.")]


@bench.command()
def decode(
    shape: ShapeOption = "125m",
    context: Annotated[int, typer.Option(help="Tokens in the cache when timing starts.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Steps to time.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    cache: CachesOption = None,
    dtype: DtypeOption = "float32",
    torch: Annotated[bool, typer.Option(help="Compare with transformers, where torch is installed.")] = True,
) -> None:
    """Time decoding steps of a whole model: full cache, KIVI, and transformers, taking turns.

    Example:  kivi-jax bench decode --context 8192 --no-torch
    """
    from kivi_jax.bench.decode import run

    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi4", "kivi2"]}
    results = run(
        shape_named(shape),
        strategies,
        context=context,
        new_tokens=new_tokens,
        batch=batch,
        dtype=dtype,
        against_torch=torch and _has_torch(),
    )
    table = Table(title=f"decode, {shape} {dtype}, {context:,} tokens x {batch} rows", caption=machine())
    columns = ["cache", "median ms/step", "fastest", "tokens/s", f"vs {results[0].name}", "cache size"]
    on_gpu = results[0].device_ms is not None
    for column in [*columns, "GPU ms/step"] if on_gpu else columns:
        table.add_column(column, justify="left" if column == "cache" else "right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.median_ms:.2f}",
            f"{min(result.steps_ms):.2f}",
            f"{batch * 1e3 / result.median_ms:.1f}",
            f"{results[0].median_ms / result.median_ms:.2f}x",
            format_bytes(result.cache_bytes),
            *([f"{result.device_ms:.2f}"] if result.device_ms is not None else []),
        )
    print_table(Console(), table)


@bench.command()
def generation(
    shape: ShapeOption = "125m",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 4096,
    cache: CachesOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Time a long generation step by step: does a step get slower, does the cache grow?

    Example:  kivi-jax bench generation --new-tokens 6000 --cache scope
    """
    from kivi_jax.bench.decode import run

    names = cache or [
        "full",
        "scope",
        f"scope:decode=discontinuous:max_new_tokens={new_tokens}",
        "kivi2+scope",
    ]
    results = run(
        shape_named(shape),
        {name: parse_cache(name) for name in names},
        context=prompt,
        new_tokens=new_tokens,
        batch=1,
        dtype=dtype,
        against_torch=False,
    )
    marks = [600, *range(2000, new_tokens, 2000), new_tokens]
    title = f"median ms of the 100 steps before a token, {shape} {dtype}, {prompt:,} prompt tokens"
    table = Table("cache", title=title, caption=machine())
    for mark in marks:
        table.add_column(f"token {mark:,}", justify="right")
    table.add_column(f"vs {results[0].name} at the end", justify="right")
    table.add_column("cache size", justify="right")
    last = results[0].median_around(new_tokens)
    for result in results:
        table.add_row(
            result.name,
            *(f"{result.median_around(mark):.2f}" for mark in marks),
            f"{last / result.median_around(new_tokens):.2f}x",
            format_bytes(result.cache_bytes),
        )
    print_table(Console(), table)


@bench.command()
def attention(
    repeats: Annotated[int, typer.Option(help="Rounds to take the median of.")] = 15,
) -> None:
    """Time decode attention alone: over packed tokens, and over dense ones, taking turns.

    Example:  kivi-jax bench attention --repeats 5
    """
    from kivi_jax.bench.attention import run, table

    print_table(Console(), table(run(repeats=repeats)))


@bench.command()
def prefix(
    shape: ShapeOption = "125m",
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4096,
    repeats: Annotated[int, typer.Option(help="Times to take the median of.")] = 3,
    cache: CachesOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Time loading a saved prompt's cache against reading the prompt again.

    Example:  kivi-jax bench prefix --context 4096 --cache full --cache kivi2
    """
    from kivi_jax.bench.prefix import run

    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi2"]}
    table = Table(title=f"a saved prefix, {shape} {dtype}, {context:,} tokens", caption=machine())
    columns = ("read s", "load s", "faster", "first read s", "first load s", "save s", "on disk")
    for column in ("cache", *columns):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for result in run(shape_named(shape), strategies, context=context, repeats=repeats, dtype=dtype):
        table.add_row(
            result.name,
            f"{result.read_s:.2f}",
            f"{result.load_s:.2f}",
            f"{result.read_s / result.load_s:.1f}x",
            f"{result.first_read_s:.2f}",
            f"{result.first_load_s:.2f}",
            f"{result.save_s:.2f}",
            format_bytes(result.disk_bytes),
        )
    print_table(Console(), table)


@bench.command()
def throughput(
    shape: ShapeOption = "llama-8b",
    context: Annotated[int, typer.Option(help="Tokens in each row's cache when timing starts.")] = 8192,
    new_tokens: Annotated[int, typer.Option(help="Steps to time.")] = 16,
    batch: Annotated[int, typer.Option(help="Rows; 0: as many as fit.")] = 0,
    memory: Annotated[str, typer.Option(help="What to fill; empty: 90 % of the device.")] = "",
    cache: CachesOption = None,
    dtype: DtypeOption = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="A directory for the figures as JSON.")] = None,
) -> None:
    """Fill the memory with rows: how many fit with each cache, and how many tokens a second do they give?

    Example:  kivi-jax bench throughput --shape 125m --memory 1GiB --dtype float32
    """
    from kivi_jax.bench.decode import throughput as run

    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi4", "kivi2"]}
    limit = parse_bytes(memory) if memory else None
    records = _written(
        run(
            shape_named(shape),
            strategies,
            context=context,
            new_tokens=new_tokens,
            dtype=dtype,
            batch=batch or None,
            memory=limit,
        ),
        out and out / "throughput.json",
    )
    title = f"{shape} {dtype}, {context:,} tokens a row"
    columns = ("cache", "batch", "ms/step", "tokens/s", "cache", "peak")
    table = Table(*columns, title=title, caption=machine())
    for record in records:
        table.add_row(
            record["cache"],
            str(record["batch"]),
            f"{record['ms']:.2f}",
            f"{record['tokens_per_s']:.0f}",
            format_bytes(record["cache_bytes"]),
            format_bytes(record["peak_bytes"]) if record["peak_bytes"] else "",
        )
    print_table(Console(), table)


@bench.command()
def mesh(
    shape: ShapeOption = "llama-8b",
    context: Annotated[int, typer.Option(help="Tokens in each row's cache when timing starts.")] = 8192,
    new_tokens: Annotated[int, typer.Option(help="Steps of a program, as in a generation.")] = 64,
    batch: Annotated[int, typer.Option(min=0, help="Rows; 0: on each mesh as many as fit.")] = 1,
    memory: Annotated[str, typer.Option(help="What to fill; empty: 90 % of each device.")] = "",
    meshes: Annotated[
        list[str] | None,
        typer.Option("--mesh", help="As in data=2,model=4; may be repeated."),
    ] = None,
    cache: Annotated[str, typer.Option(help="How tokens are held.")] = "kivi2",
    layers: Annotated[int, typer.Option(help="Of the shape's layers, the first; 0: all.")] = 0,
    dtype: DtypeOption = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="A directory for the figures as JSON.")] = None,
) -> None:
    """Time decoding steps on meshes of this machine's devices, and the sums between these alone.

    The last columns are bytes on each device.

    Example:  kivi-jax bench mesh --shape 125m --batch 8 --dtype float32
    """
    import dataclasses

    from kivi_jax.bench import mesh as bench_mesh
    from kivi_jax.mesh import read_mesh

    if memory and batch:
        raise ValueError(f"--memory is what rows fill, and {batch=} says how many: pass --batch 0 with it")
    strategy, config = parse_cache(cache), shape_named(shape)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    sizes = [(m.shape["data"], m.shape["model"]) for m in map(read_mesh, meshes or ())]
    records = _written(
        bench_mesh.run(
            config,
            strategy,
            sizes or bench_mesh.meshes_here(config),
            context=context,
            new_tokens=new_tokens,
            batch=batch or None,
            dtype=dtype,
            memory=parse_bytes(memory) if memory else None,
        ),
        out and out / "mesh.json",
    )
    title = f"{shape} {dtype}, {cache}, {context:,} tokens a row"
    print_table(Console(width=110), bench_mesh.table(list(records), title, machine()))


@bench.command()
def kernels(
    aot: Annotated[bool, typer.Option("--aot", help="Compile only, and count: needs no GPU.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Time every tuning instead.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only cases whose name begins so.")] = None,
    out: Annotated[Path | None, typer.Option(help="A directory for one JSON file a stage.")] = None,
) -> None:
    """Check and time the GPU kernels of decode attention against bfloat16.

    Example:  kivi-jax bench kernels --out results
    """
    from pallas_kernels.quantized_attention.cases import COMPILED, GPU

    def chosen(cases: "tuple[Case, ...]") -> "list[Case]":
        return [c for c in cases if not case or any(c.name.startswith(name) for name in case)]

    def stage(name: str, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(_written(records, out and out / f"{name}.json"))

    if aot:
        from kivi_jax.bench import aot as compiler

        wide = Console(width=120)
        print_table(wide, compiler.table(stage("aot", compiler.run(chosen((*COMPILED, *GPU))))))
        print_table(wide, compiler.packing_table(stage("aot-packing", compiler.packing())))
        return
    import jax

    from kivi_jax.bench import kernels as gpu

    if jax.default_backend() != "gpu":
        raise ValueError("there is no GPU: pass --aot to compile the kernels without one")
    console = Console(width=110)
    console.print(*stage("environment", gpu.environment()))
    if sweep:
        print_table(console, gpu.best_tunings(stage("sweep", gpu.sweep(chosen(GPU)))))
        return
    print_table(console, gpu.error_table(stage("correctness", gpu.correctness())))
    print_table(console, gpu.table(stage("speed", gpu.speed(chosen(GPU)))))


@bench.command()
def compiled(
    shape: Annotated[str, typer.Option(help="125m or llama-8b; random weights.")] = "llama-8b",
    layers: Annotated[int, typer.Option(help="Layers of the model: compiling takes time for each.")] = 2,
    context: Annotated[int, typer.Option(help="Tokens in the cache.")] = 4096,
    cache: Annotated[list[str] | None, typer.Option(help="Caches to compare; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="A directory for one JSON file a table.")] = None,
) -> None:
    """Count what XLA launches on a GPU, for packing a prompt and for a decode step. Needs no GPU.

    Example:  kivi-jax bench compiled --cache full --cache kivi2
    """
    import dataclasses

    from kivi_jax.bench import compiled as programs

    device, config = programs.described_gpu(), dataclasses.replace(shape_named(shape), num_layers=layers)
    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi2", "scope", "kivi2+scope"]}
    console = Console(width=110)
    packed = list(_written(programs.packing(device), out and out / "packing.json"))
    print_table(console, programs.packing_table(packed))
    found = programs.steps(device, config, strategies, context=context)
    print_table(console, programs.steps_table(list(_written(found, out and out / "steps.json"))))
    console.print(f"{shape}, {layers} layers, {context:,} tokens; {device.device_kind}; {machine()}")


@bench.command()
def gpu(
    out: Annotated[Path, typer.Option(help="A directory for one JSON file a stage.")],
    stage: Annotated[list[str] | None, typer.Option(help="Only these stages; may be repeated.")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On a CPU, with tiny sizes.")] = False,
    seconds: Annotated[float, typer.Option(help="What a stage may take at most.")] = 460.0,
) -> None:
    """Learn all there is from a GPU: versions, predictions, correctness, kernels, whole steps, in stages.

    Example:  kivi-jax bench gpu --out results

    Example:  kivi-jax bench gpu --out results --stage predictions
    """
    from kivi_jax.bench import agreement, kernels, packing, predictions, prompts
    from kivi_jax.bench import gpu as stages

    console = Console(width=110)
    for name, found in stages.run(out, stage or list(stages.STAGES), rehearse=rehearse, seconds=seconds):
        records, error = found["records"], found.get("error")
        ending = f"[bold red]{escape(error)}[/]" if error else "complete"
        took = f"{len(records)} records in {found['seconds']:.0f} s"
        console.print(f"{name}: {took}, {ending}", highlight=False)
        if name == "environment":
            console.print(*records)
        if name.startswith("correctness") and records:
            print_table(console, kernels.error_table(records))
        if name == "speed" and records:
            print_table(console, kernels.table(records))
        if name == "packing" and records:
            print_table(console, packing.table(records))
        if name == "product" and records:
            print_table(console, agreement.table(records))
        if name == "peers":
            console.print(*records)
    if read := [record for name in stages.PROMPTS for record in stages.read(out / f"{name}.json")]:
        print_table(console, prompts.table(read))
    measured = [record for name in ("speed", *stages.STEPS) for record in stages.read(out / f"{name}.json")]
    if compared := predictions.compare(stages.read(out / "predictions.json"), measured):
        copied = [r["copy_gigabytes_per_s"] for r in stages.read(out / "environment.json")]
        print_table(console, predictions.table(compared, *copied))


def _written(records: Iterable[dict[str, Any]], path: Path | None) -> Iterator[dict[str, Any]]:
    """Pass records on; the file holds all so far, whenever the run is cut."""
    found = []
    if path:
        check_place(path, b"[\n {")
    for record in records:
        found.append(record)
        if path:
            with whole(path) as partial:
                partial.write_text(json.dumps(found, indent=1) + "\n")
        yield record


def shape_named(name: str) -> "ModelConfig":
    """One of `SHAPES`.

    Raises:
        ValueError: it is none of them.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


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
