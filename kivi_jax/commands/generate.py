"""`kivi-jax generate`: one prompt, continued."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kivi_jax import options
from kivi_jax.console import compare_bytes

if TYPE_CHECKING:
    from kivi_jax.cache.strategy import KVCache
    from kivi_jax.model.llama import Llama


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

    from kivi_jax.cache.names import parse_cache
    from kivi_jax.generation.loading import open_model
    from kivi_jax.generation.sampling import make_sampler
    from kivi_jax.generation.stops import decode_stream
    from kivi_jax.generation.text import encode_prompt, stream_tokens, text_before

    start: dict[str, Any] = {} if cache is None else {"cache": parse_cache(cache)}
    sampler = make_sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    llama, tokenizer = open_model(model, dtype)
    if prefix is not None:
        from kivi_jax.generation.prefix_files import load_prefix

        start = {"prefix": load_prefix(prefix, llama, **start)}
    elif not start:
        start = {"cache": parse_cache("kivi2")}
    text = sys.stdin.read() if prompt == "-" else prompt
    held_before = start.get("prefix")
    ids = encode_prompt(tokenizer, text, held_before)
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

    for piece in decode_stream(tokenizer, watched(), text_before(ids, held_before)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    Console(stderr=True).print(_cost(llama, len(ids), moments, last[0]), style="dim", highlight=False)


def _cost(model: "Llama", prompt_tokens: int, moments: Sequence[float], held: "KVCache") -> str:
    """One line: tokens, speed without compilation, and what the cache weighs."""
    from kivi_jax.cache.strategy import cache_bytes, full
    from kivi_jax.plan.memory import plan_cache

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
