"""`kivi-jax generate`: one prompt, continued, or a file of them."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer

from kivi_jax import options
from kivi_jax.commands.hints import FIRST_TOKEN, as_prompt, reading, say
from kivi_jax.console import compare_bytes

if TYPE_CHECKING:
    from kivi_jax.cache.strategy import KVCache
    from kivi_jax.generation.generate import Decoding
    from kivi_jax.generation.templates import Prompt
    from kivi_jax.generation.tokens import Tokenizer
    from kivi_jax.model.llama import Llama


def generate(
    model: options.ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from standard input.")
    ] = None,
    cache: options.CacheOrPrefixOption = None,
    prefix: Annotated[
        FilePath | None, typer.Option(help="What the prompt follows: made by kivi-jax cache save.")
    ] = None,
    chat: options.ChatOption = False,
    system: options.SystemOption = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the output, itself left out; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to add.")] = 128,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    min_p: options.MinPOption = 0.0,
    repetition_penalty: options.PenaltyOption = 1.0,
    seed: options.SeedOption = 0,
    source: Annotated[
        FilePath | None,
        typer.Option("--input", help="Instead of PROMPT, a file of JSON lines with a prompt, or messages."),
    ] = None,
    destination: Annotated[
        FilePath | None,
        typer.Option("--output", help="The file for their answers; the same command again goes on in it."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of --input computed together.")] = 8,
    as_json: options.JsonOption = False,
    dtype: options.DtypeOption = None,
    mesh: options.MeshOption = None,
    distributed: Annotated[
        bool,
        typer.Option("--distributed", help="Started on several hosts: --mesh is over all their devices."),
    ] = False,
) -> None:
    """Continue a prompt, streaming the text, and say what it cost.

    Example:  kivi-jax generate demo "Copy: moon owl lemon. Copied:"

    Example:  kivi-jax generate ./llama-8b-instruct "Why is it blue?" --chat

    Example:  kivi-jax generate ./llama-8b "Who did it?" --prefix novel.prefix

    Example:  kivi-jax generate ./llama-8b --input in.jsonl --output out.jsonl
    """
    if distributed:
        arguments = locals()
        if mesh is None:
            raise ValueError("--distributed needs --mesh, over the devices of all hosts")
        from kivi_jax.commands.hosts import for_this_host, together

        with together():
            here = {"destination": destination and for_this_host(destination), "distributed": False}
            return generate(**{**arguments, **here})
    import jax

    from kivi_jax.cache.names import parse_cache
    from kivi_jax.generation.loading import open_model
    from kivi_jax.generation.sampling import make_sampler
    from kivi_jax.generation.stops import check_stop

    if (prompt is None) == (source is None):
        raise ValueError("pass either a prompt or --input, a file of prompts")
    if (source is None) != (destination is None) or (source is not None and as_json):
        raise ValueError("--input needs --output, which is JSON in any case, and a prompt needs neither")
    if prefix is not None and system is not None:
        raise ValueError("the prefix begins the conversation: pass --system to kivi-jax cache save")
    own = options.DEFAULT_CACHE if cache is None and prefix is None else cache  # else the prefix brings it
    strategy = None if own is None else parse_cache(own)
    sampler = make_sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = check_stop(stop or ())
    if any("\\n" in text for text in stops):
        say("hint: a --stop has a backslash and an n; a line's end is $'\\n' in bash and zsh")
    llama, tokenizer = open_model(model, dtype, mesh)
    drawing: Decoding = {"max_new_tokens": max_new_tokens, "sampler": sampler}
    if prefix is None:
        drawing["cache"] = strategy
    else:
        from kivi_jax.generation.prefix_files import load_prefix

        drawing["prefix"] = load_prefix(prefix, llama, cache=strategy)

    def ask(text: str) -> "Prompt":
        return as_prompt(tokenizer, text, chat=chat, system=system, begins=prefix is None)

    if prompt is not None:
        text = sys.stdin.read() if prompt == "-" else prompt
        drawing["key"] = jax.random.key(seed)
        answer = _stream(llama, tokenizer, ask(text), stops, drawing, shown=not as_json)
        answer.report(llama, as_json=as_json)
        return
    from convert.hub import resolve
    from kivi_jax.commands.answers import answer_file
    from kivi_jax.commands.hosts import agree
    from kivi_jax.eval import contents
    from kivi_jax.generation.loading import dtype_name
    from kivi_jax.generation.prefix_files import MANIFEST

    assert source is not None
    assert destination is not None
    read = dict(
        input=contents.of_data(source),
        prefix=None if prefix is None else contents.of_data(prefix / MANIFEST),
    )
    settings = dict(
        model=model,
        cache=cache,
        prefix=None if prefix is None else str(prefix),
        chat=chat,
        system=system,
        stop=list(stops),
        max_new_tokens=max_new_tokens,
        sampler=repr(sampler),
        seed=seed,
        dtype=dtype_name(dtype),
        **contents.together(model=contents.of_model(resolve(model)), **read),
    )
    agree(settings | contents.together(**read))  # a model's mark has its files' times: hosts have copies
    answer_file(
        llama,
        tokenizer,
        source,
        destination,
        ask=ask,
        system=system,
        settings=settings,
        stop=stops,
        rows=batch,
        seed=seed,
        drawing=drawing,
    )


@dataclass
class _Answer:
    """One answer, and what it took."""

    prompt_tokens: int
    moments: list[float] = field(default_factory=lambda: [time.perf_counter()])  # the start, then each token
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    held: "KVCache | None" = None
    ended: bool = False  # by itself, not at the most tokens
    stopped: bool = False  # by a stop string

    def report(self, model: "Llama", *, as_json: bool) -> None:
        """What it cost and how it ended: a line on stderr, or all of it as JSON on stdout."""
        size, whole = self._bytes(model)
        first, speed = self.moments[1] - self.moments[0], self._tokens_per_second()
        if as_json:
            fields = {
                "text": "".join(self.pieces),
                "tokens": self.tokens,
                "finish_reason": "stop" if self.ended else "length",
                "prompt_tokens": self.prompt_tokens,
                "seconds_to_first_token": first,
                "tokens_per_second": speed,
                "cache_bytes": size,
                "full_cache_bytes": whole,
            }
            typer.echo(json.dumps(fields, ensure_ascii=False))
            return
        parts = [f"{self.prompt_tokens} prompt tokens", f"{len(self.tokens)} new tokens"]
        parts.append(f"first after {first:.2f} s (compiling and reading the prompt)")
        if speed is not None:
            parts.append(f"then {speed:.1f} tokens/s")
        parts.append(compare_bytes(size, whole))
        if not self.ended:
            parts.append("cut at --max-new-tokens")
        elif len(self.tokens) == 1 and not self.stopped:
            parts.append(FIRST_TOKEN)
        say(" · ".join(parts))

    def _tokens_per_second(self) -> float | None:
        """Without the second token, which compiled the decoding step; None for so few."""
        new = len(self.tokens)
        return (new - 2) / (self.moments[-1] - self.moments[2]) if new > 2 else None

    def _bytes(self, model: "Llama") -> tuple[int, int]:
        """The cache, and a full one for as many tokens."""
        from kivi_jax.cache.strategy import cache_bytes, full
        from kivi_jax.plan.memory import plan_cache

        assert self.held is not None
        dtype = model.embed.embedding[...].dtype
        whole = plan_cache(model.config, full(), batch=1, context=self.held.capacity, dtype=dtype)
        return cache_bytes(self.held)["total"], whole["total"]


def _stream(
    model: "Llama",
    tokenizer: "Tokenizer",
    prompt: "Prompt",
    stop: tuple[str, ...],
    drawing: "Decoding",
    *,
    shown: bool,
) -> _Answer:
    """The answer to a prompt, written to stdout as it comes if it is `shown`."""
    from kivi_jax.generation.stops import Decoder
    from kivi_jax.generation.text import encode_prompt, stream_tokens, text_before
    from kivi_jax.generation.tokens import ending_ids

    prefix = drawing.get("prefix")
    ids, ends = encode_prompt(tokenizer, prompt, prefix), ending_ids(model.config, tokenizer)
    decoder = Decoder(tokenizer, text_before(ids, prefix), stop=stop, ends=ends)
    answer = _Answer(len(ids))

    def show(piece: str) -> None:
        answer.pieces.append(piece)
        if shown:
            sys.stdout.write(piece)
            sys.stdout.flush()

    drawing = drawing.copy()
    drawing["eos_ids"] = ends
    tokens = stream_tokens(model, ids, **drawing)
    with reading(f"{len(ids):,} tokens"):
        drawn = next(tokens, None)
    while drawn is not None:
        token, answer.held = drawn
        answer.moments.append(time.perf_counter())
        answer.tokens.append(token)
        show(decoder.push(token))
        answer.stopped = decoder.stopped
        answer.ended = token in ends or answer.stopped
        drawn = None if decoder.stopped else next(tokens, None)
    show(decoder.finish() + "\n" * shown)
    return answer
