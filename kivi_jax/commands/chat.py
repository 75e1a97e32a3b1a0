"""`kivi-jax chat`: a conversation in the terminal."""

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kivi_jax import options
from kivi_jax.commands.hints import FIRST_TOKEN, reading, say
from kivi_jax.console import compare_bytes, fail

if TYPE_CHECKING:
    from kivi_jax.generation.chat import Chat

COMMANDS = "/stats shows what the cache weighs, /reset forgets everything, /quit ends; Ctrl-C stops a reply"


def chat(
    model: options.ModelArgument,
    cache: options.CacheOption = options.DEFAULT_CACHE,
    context: Annotated[
        int | None,
        typer.Option(
            max=2**31 - 1, help="Tokens of the whole conversation; by default the model's, at most 8192."
        ),
    ] = None,
    system: options.SystemOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 512,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    min_p: options.MinPOption = 0.0,
    repetition_penalty: options.PenaltyOption = 1.0,
    seed: options.SeedOption = 0,
    dtype: options.DtypeOption = None,
    mesh: options.MeshOption = None,
) -> None:
    """Talk to a model; its cache is kept between turns, and nothing is read twice.

    Messages are put into the tokenizer's chat template, if it has one; else they are read as they are.
    /stats shows what the cache weighs, /reset forgets everything, /quit ends; Ctrl-C stops a reply.
    demo is no chat model. Type one of its tasks, such as  Copy: moon owl. Copied:

    Example:  kivi-jax chat ./llama-8b-instruct --cache kivi42r --context 32768

    Example:  kivi-jax chat demo
    """
    import jax

    from kivi_jax.cache.names import parse_cache
    from kivi_jax.generation.chat import Chat
    from kivi_jax.generation.loading import open_model
    from kivi_jax.generation.sampling import make_sampler

    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    strategy = parse_cache(cache)
    sampler = make_sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    llama, tokenizer = open_model(model, dtype, mesh)
    if context is None:
        context = min(llama.config.max_position_embeddings, 8192)
    talk = Chat(llama, tokenizer, cache=strategy, context=context, sampler=sampler, system=system)
    notes = Console(stderr=True, highlight=False)
    notes.print(f"{cache} cache, up to {context:,} tokens; {COMMANDS}", style="dim")
    for turn in itertools.count():
        message = _ask(notes)
        if message in (None, "/quit"):
            return
        if message == "/reset":
            talk.reset()
        if message in ("/reset", "/stats"):
            notes.print(_stats(talk), style="dim")
        elif message.startswith("/"):
            notes.print(f"there is no {message.split()[0]}: {COMMANDS}", style="dim", markup=False)
        elif message:
            key = jax.random.fold_in(jax.random.key(seed), turn)
            tokens = talk.reply(message, max_new_tokens=max_new_tokens, key=key)
            try:
                _write(talk, tokens)
            except ValueError as error:  # the conversation is as it was
                fail(str(error))


def _write(talk: "Chat", tokens: Iterator[int]) -> None:
    """A reply as it comes, and what is to be said of its end; Ctrl-C ends it."""
    from kivi_jax.generation.stops import Decoder

    with first_interrupt() as interrupted:
        with reading("the message"):
            first = list(itertools.islice(tokens, 1))
        decoder = Decoder(talk.tokenizer, talk.tokens[: talk.replied], ends=talk.ends)
        for token in itertools.chain(first, tokens):
            _show(decoder.push(token))
            if interrupted.is_set():
                break
    new = talk.tokens[talk.replied :]
    _show(decoder.finish() + "\n")
    if interrupted.is_set():
        say("stopped")
    elif len(talk.tokens) == talk.context:
        say("cut where the context ends: /reset, or start with a larger --context")
    elif new[-1] not in talk.ends:
        say("cut at --max-new-tokens")
    elif len(new) == 1:
        say(FIRST_TOKEN)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


@contextlib.contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C sets an event and breaks nothing off; a second one interrupts as always."""
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _ask(console: Console) -> str | None:
    """The next message; None at the end of input."""
    try:
        if sys.stdin.isatty():
            return console.input("[bold cyan]> [/]").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except (EOFError, KeyboardInterrupt):
        return None


def _stats(talk: "Chat") -> str:
    """One line: tokens, and the cache beside a full one of the same context."""
    from kivi_jax.cache.strategy import cache_bytes, full
    from kivi_jax.plan.memory import plan_cache

    if talk.prefix is None:
        return f"nothing yet, of {talk.context:,} tokens"
    model = talk.model
    size = cache_bytes(talk.prefix.cache)["total"]
    dtype = model.embed.embedding[...].dtype
    whole = plan_cache(model.config, full(), batch=1, context=talk.context, dtype=dtype)["total"]
    return f"{len(talk.tokens):,} of {talk.context:,} tokens · {compare_bytes(size, whole)}"
