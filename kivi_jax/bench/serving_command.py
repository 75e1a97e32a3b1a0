"""`kivi-jax bench engine` and `kivi-jax bench serving`: requests through an engine."""

from typing import Annotated

import typer
from rich.console import Console

from kivi_jax.bench.command import CachesOption, DtypeOption, ShapeOption, machine, shape_named
from kivi_jax.cache.names import parse_cache
from kivi_jax.console import format_bytes, parse_bytes, print_table
from kivi_jax.options import MeshOption


def engine(
    model: Annotated[str, typer.Option(help="A directory, a hub name, or demo.")] = "demo",
    cache: CachesOption = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests at a time, and rows of a batch.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 64,
    shortest: Annotated[int, typer.Option(min=1, help="New tokens, at least.")] = 16,
    longest: Annotated[int, typer.Option(min=1, help="New tokens, at most; log-uniform between.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="To take the median of.")] = 3,
) -> None:
    """Answer requests of mixed lengths through an engine's slots, and in batches that wait for their longest.

    And let a long prompt arrive beside a row that runs: how long does it wait for its tokens?

    Example:  kivi-jax bench engine --cache full --cache kivi2
    """
    from kivi_jax.bench import engine as mixed
    from kivi_jax.bench import serving
    from kivi_jax.generation.loading import load

    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi2", "scope", "kivi2+scope"]}
    loaded, _ = load(model)
    results = mixed.run(
        loaded,
        strategies,
        slots=slots,
        requests=requests,
        prompt=prompt,
        shortest=shortest,
        longest=longest,
        rounds=rounds,
    )
    title = f"{requests} requests of {shortest} to {longest} new tokens, {slots} slots, {model}"
    print_table(Console(), mixed.table(list(results), title=title, caption=machine()))
    waits = serving.waits(loaded, strategies, prompt=4096, chunk_tokens=256)
    title = f"what a row waits while a prompt of 4,096 tokens is read in chunks of 256, {model}"
    print_table(Console(), serving.waits_table(list(waits), title=title, caption=machine()))


def serving(
    shape: ShapeOption = "llama-8b",
    cache: CachesOption = None,
    memory: Annotated[
        str, typer.Option(help="For weights, prefixes and slots of a device; empty: 90 % of it.")
    ] = "",
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the longest prompt.")] = 4096,
    shared: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    shortest: Annotated[int, typer.Option(min=1, help="New tokens, at least.")] = 16,
    longest: Annotated[int, typer.Option(min=1, help="New tokens, at most; log-uniform between.")] = 512,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that are read at a time.")] = 512,
    seconds: Annotated[float, typer.Option(min=0.1, help="To count for, with each cache.")] = 20.0,
    layers: Annotated[int, typer.Option(min=0, help="Of the shape's layers, the first; 0: all.")] = 0,
    dtype: DtypeOption = "bfloat16",
    mesh: MeshOption = None,
) -> None:
    """Answer more requests than can run at a time: how many a second does each cache's memory hold?

    Example:  kivi-jax bench serving --memory 22GiB --shared 3968
    """
    import dataclasses

    from flax import nnx

    from kivi_jax.bench import serving as saturated
    from kivi_jax.bench.decode import memory_of_device
    from kivi_jax.bench.mesh import random_model
    from kivi_jax.mesh import named_mesh
    from kivi_jax.model.llama import Llama

    if shared >= prompt:
        raise ValueError(f"--shared {shared} must be less than the longest prompt, --prompt {prompt}")
    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi2"]}
    limit, config = parse_bytes(memory) if memory else memory_of_device(), shape_named(shape)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    model = (
        random_model(config, dtype, named_mesh(mesh))
        if mesh
        else Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    )
    results = saturated.saturate(
        model,
        strategies,
        memory_bytes=limit,
        prompt=prompt,
        shared=shared,
        shortest=shortest,
        longest=longest,
        chunk_tokens=chunk,
        seconds=seconds,
    )
    title = (
        f"{shape} {dtype}, {config.num_layers} layers, {format_bytes(limit)} on "
        f"{mesh or 'a device'}: prompts of {shared + 1:,} to "
        f"{prompt:,} tokens ({shared:,} alike), {shortest} to {longest} new ones"
    )
    print_table(Console(), saturated.saturated_table(list(results), title=title, caption=machine()))
