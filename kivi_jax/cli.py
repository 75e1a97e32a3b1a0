"""`kivi-jax`: the command line. Each command imports what it needs when it runs, to start fast."""

import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from convert.command import Dtype, convert
from kivi_jax import options
from kivi_jax.bench.command import bench
from kivi_jax.bench.shapes import SHAPES
from kivi_jax.cache_command import cache_files
from kivi_jax.chat_command import chat
from kivi_jax.console import compare_bytes, format_bytes, parse_bytes, run
from kivi_jax.demo.command import demo, evaluation
from kivi_jax.eval.command import evaluate

if TYPE_CHECKING:
    from kivi_jax.cache import CacheStrategy, KVCache
    from kivi_jax.config import ModelConfig
    from kivi_jax.llama import Llama

HELP = """2-bit KV caches (KIVI) and token selection (SCOPE) for Llama and Mistral in JAX.

Try it:  kivi-jax demo

Plan memory:  kivi-jax inspect llama-8b --context 131072 --memory 80GB

Talk:  kivi-jax chat ./llama-8b-instruct --cache kivi2

Read once, ask often:  kivi-jax cache save ./llama-8b novel.txt novel.prefix

A model is a directory, a hub name, or demo: the small one in this package.

A cache is a name, and fields after colons:
full keeps every token as it is;
kivi2:group_size=64:residual_length=64 packs in 2 bits, kivi4 in 4;
scope:window=512:recent=256 bounds what is generated;
kivi2+scope:prompt=snapkv:prompt_budget=2048 also selects from the prompt.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def generate(
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    cache: options.CacheOrPrefixOption = None,
    prefix: Annotated[
        FilePath | None, typer.Option(help="What the prompt follows: made by kivi-jax cache save.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to add.")] = 128,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    min_p: options.MinPOption = 0.0,
    repetition_penalty: options.PenaltyOption = 1.0,
    seed: options.SeedOption = 0,
    dtype: options.DtypeOption = None,
) -> None:
    """Continue a prompt, streaming the text, and say what it cost.

    Example:  kivi-jax generate demo "Copy: moon owl lemon. Copied:"

    Example:  kivi-jax generate ./llama-8b "Once upon a time" --cache kivi4

    Example:  kivi-jax generate ./llama-8b "Who did it?" --prefix novel.prefix
    """
    import jax

    from kivi_jax.names import parse_cache
    from kivi_jax.text import decode_stream, encode, stream_tokens

    start: dict[str, Any] = {} if cache is None else {"cache": parse_cache(cache)}
    sampler = options.make_sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    llama, tokenizer = options.open_model(model, dtype)
    if prefix is not None:
        from kivi_jax.prefix_files import load_prefix

        start = {"prefix": load_prefix(prefix, llama, **start)}
    elif not start:
        start = {"cache": parse_cache("kivi2")}
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode(tokenizer, text, begins=prefix is None)
    moments = [time.perf_counter()]
    last: list[KVCache] = []

    def watched() -> Iterator[int]:
        tokens = stream_tokens(
            llama,
            ids,
            **start,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            key=jax.random.key(seed),
        )
        for token, held in tokens:
            moments.append(time.perf_counter())
            last[:] = [held]
            yield token

    for piece in decode_stream(tokenizer, watched()):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    Console(stderr=True).print(_cost(llama, len(ids), moments, last[0]), style="dim", highlight=False)


def _cost(model: "Llama", prompt_tokens: int, moments: Sequence[float], held: "KVCache") -> str:
    """One line: tokens, speed without compilation, and what the cache weighs."""
    from kivi_jax.cache import cache_bytes, full
    from kivi_jax.plan import plan_cache

    new = len(moments) - 1
    parts = [f"{prompt_tokens} prompt tokens", f"{new} new tokens"]
    parts.append(f"first after {moments[1] - moments[0]:.2f} s (compiling and reading the prompt)")
    if new > 2:  # the second token compiled the decoding step
        parts.append(f"then {(new - 2) / (moments[-1] - moments[2]):.1f} tokens/s")
    dtype = model.embed.embedding[...].dtype
    size = cache_bytes(held)["total"]
    whole = plan_cache(model.config, full(), batch=1, context=held.capacity, dtype=dtype)["total"]
    parts.append(compare_bytes(size, whole))
    return " · ".join(parts)


def inspect(
    model: Annotated[
        str,
        typer.Argument(help=f"A checkpoint's directory, a hub name, demo, or one of {', '.join(SHAPES)}."),
    ],
    context: Annotated[int, typer.Option(help="Tokens a row holds, prompt and output together.")] = 32768,
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
) -> None:
    """Plan memory: what each cache of a model weighs, and the batch that fits. Needs no weights.

    Example:  kivi-jax inspect llama-8b --context 131072 --batch 4 --memory 80GB

    Example:  kivi-jax inspect llama-8b --prompt 4096 --plot memory.png
    """
    from convert import read_any_config
    from kivi_jax.names import parse_cache
    from kivi_jax.plan import largest_batch, parameter_count, plan_cache

    config = SHAPES.get(model) or read_any_config(model)
    strategies = {name: parse_cache(name) for name in cache or ["full", "kivi4", "kivi2", "kivi2+scope"]}
    limit = parse_bytes(memory or "24GiB")
    weights = parameter_count(config) * {"float32": 4}.get(dtype.value, 2)
    rows_of = f"{context:,} tokens x {batch} row{'s' * (batch > 1)}"
    console = Console()
    table = Table(
        title=f"{rows_of}, {dtype.value}; weights {format_bytes(weights)}",
        caption=f"max batch: rows of {context:,} tokens that fit into {memory or '24GiB'} beside the weights",
        padding=(0, 1 if console.width >= 110 else 0),  # nine columns, in 80 characters, too
    )
    table.add_column("cache", overflow="fold", min_width=11)  # names differ at their ends
    columns = ("bytes/token", "total", "smaller", "packed", "scales", "full prec.", "pool", "max batch")
    for column in columns:
        table.add_column(column.replace(" ", "\n").replace("/", "/\n"), justify="right", no_wrap=True)
    size = functools.partial(
        plan_cache, config, batch=batch, context=context, dtype=dtype.value, prompt_tokens=prompt
    )
    whole = size(parse_cache("full"))
    for name, strategy in strategies.items():
        parts = size(strategy)
        rows = largest_batch(
            config, strategy, context=context, dtype=dtype.value, memory_bytes=limit, prompt_tokens=prompt
        )
        table.add_row(
            name,
            f"{parts['total'] / (context * batch):,.0f}",
            format_bytes(parts["total"]),
            f"{whole['total'] / parts['total']:.2f}x",
            format_bytes(parts["packed"]),
            format_bytes(parts["scales"]),
            format_bytes(parts["rings"] + parts["dense"]),
            format_bytes(parts["pool"]),
            f"{rows:,}",
        )
    console.print(table)
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
    from kivi_jax.plan_plot import contexts_up_to, draw_memory, memory_curves

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


# In the order of a first hour; groups are listed after commands.
for command in (demo, generate, chat, inspect, convert):
    app.command()(command)
evaluate.add_typer(evaluation)
for name, group in {"cache": cache_files, "eval": evaluate, "bench": bench}.items():
    app.add_typer(group, name=name)


def main() -> None:
    """The entry point of `kivi-jax`."""
    run(app)


if __name__ == "__main__":
    main()
