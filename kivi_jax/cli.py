"""`kivi-jax`: the command line. Each command imports what it needs when it runs, to start fast."""

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from convert.command import Dtype, convert
from kivi_jax.bench.command import bench
from kivi_jax.console import format_bytes, parse_bytes, run
from kivi_jax.eval.command import evaluate

if TYPE_CHECKING:
    from kivi_jax.cache import KVCache
    from kivi_jax.llama import Llama

app = typer.Typer(
    help="2-bit KV caches (KIVI) and token selection (SCOPE) for Llama and Mistral in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(convert)
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")

ModelArgument = Annotated[
    str,
    typer.Argument(help="A checkpoint's directory, a hub name, or random: a small model of no use."),
]
CacheOption = Annotated[
    str,
    typer.Option(
        help="full, kivi4, kivi2, scope, kivi2+scope; fields after colons: kivi2:group_size=64, "
        "kivi2+scope:window=512:recent=256:prompt=snapkv:prompt_budget=2048."
    ),
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="By default float32 on a CPU, else bfloat16.")]


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    cache: CacheOption = "kivi2",
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely relative to the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes seen tokens less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of random sampling.")] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Continue a prompt, streaming the text, and say what it cost.

    Example:  kivi-jax generate ./llama-8b "Once upon a time" --cache kivi2 --max-new-tokens 64
    """
    import jax

    from kivi_jax.loading import load
    from kivi_jax.names import parse_cache
    from kivi_jax.random_model import random_model
    from kivi_jax.sampling import Greedy, Sample
    from kivi_jax.text import decode_stream, stream_tokens

    strategy = parse_cache(cache)
    if temperature == 0:
        sampler = Greedy(repetition_penalty=repetition_penalty)
    else:
        sampler = Sample(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
    errors = Console(stderr=True)
    with errors.status("loading"):
        if model == "random":
            llama, tokenizer = random_model()
        else:
            llama, tokenizer = load(model, dtype=None if dtype is None else dtype.value)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer files: copy the tokenizer's files there")
    ids = tokenizer(sys.stdin.read() if prompt == "-" else prompt)["input_ids"]
    moments = [time.perf_counter()]
    last: list[KVCache] = []

    def watched() -> Iterator[int]:
        tokens = stream_tokens(
            llama,
            ids,
            cache=strategy,
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
    errors.print(_cost(llama, len(ids), moments, last[0]), style="dim", highlight=False)


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
    parts.append(f"cache {format_bytes(size)}, full cache {format_bytes(whole)} ({whole / size:.2f}x)")
    return " · ".join(parts)


@app.command()
def inspect(
    model: ModelArgument,
    context: Annotated[int, typer.Option(help="Tokens a row holds, prompt and output together.")] = 32768,
    prompt: Annotated[int | None, typer.Option(help="Of those, the prompt's; by default all.")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    memory: Annotated[
        str, typer.Option(help="For the largest batch, weights included: 24GiB, 80GB.")
    ] = "24GiB",
    cache: Annotated[list[str] | None, typer.Option(help="A cache to plan for; may be repeated.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and full-precision tokens.")] = Dtype.bfloat16,
) -> None:
    """Print a model's memory plan: what each cache weighs, and the batch that fits. Needs config.json only.

    Example:  kivi-jax inspect ./llama-8b --context 131072 --batch 4 --memory 80GB
    """
    from convert import read_any_config
    from kivi_jax.names import parse_cache
    from kivi_jax.plan import largest_batch, parameter_count, plan_cache

    config = read_any_config(model)
    weights = parameter_count(config)
    width = {"float32": 4}.get(dtype.value, 2)
    table = Table(
        title=f"{context:,} tokens x {batch} rows, {dtype.value}; weights {format_bytes(weights * width)}",
        caption=f"max batch: rows of {context:,} tokens that fit into {memory} beside the weights",
    )
    for column in ("cache", "bytes/token", "total", "smaller", "packed", "scales", "full prec.", "pool"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    table.add_column("max batch", justify="right")
    size = functools.partial(
        plan_cache, config, batch=batch, context=context, dtype=dtype.value, prompt_tokens=prompt
    )
    whole = size(parse_cache("full"))
    for name in cache or ["full", "kivi4", "kivi2"]:
        strategy = parse_cache(name)
        parts = size(strategy)
        rows = largest_batch(
            config,
            strategy,
            context=context,
            dtype=dtype.value,
            memory_bytes=parse_bytes(memory),
            prompt_tokens=prompt,
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
    Console().print(table)


def main() -> None:
    """The entry point of `kivi-jax`."""
    run(app)


if __name__ == "__main__":
    main()
