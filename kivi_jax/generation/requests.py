"""What an engine is asked for, and what it answers: values, and the handle between two threads."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kivi_jax.checks import real, whole
from kivi_jax.generation.sampling import make_sampler
from kivi_jax.generation.stops import check_stop

MOST_LOG_PROBS = 20  # alternatives to a token that can be asked for
MOST_STOP_IDS = 16

Reason = Literal["stop", "length", "cancelled", "deadline"]


class TooLong(ValueError):
    """A prompt and the tokens asked for do not fit into the engine's context."""


class QueueFull(RuntimeError):
    """As many requests wait as may: ask again later."""


class EngineClosed(RuntimeError):
    """The engine takes no requests, or broke down: the message says why."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how it is to be continued.

    Args:
        tokens: the prompt's token ids.
        max_new_tokens: the most tokens to add; 0 only reads the prompt.
        temperature: of random sampling; 0 takes the most likely token. This and the next four are `Sample`'s.
        top_k: see `Sample`.
        top_p: see `Sample`.
        min_p: see `Sample`.
        repetition_penalty: see `Sample`.
        presence_penalty: taken from the logits of tokens that have been added before.
        frequency_penalty: taken from them as often as they have been added.
        logit_bias: added to the logits of tokens, before anything else.
        seed: of random sampling, modulo 2**32: the same request draws the same tokens, whatever runs beside.
        stop_ids: tokens that end it; by default the model's and the tokenizer's own.
        stop: strings that end it; they are left out of the text.
        log_probs: how many alternatives' log-probabilities each token comes with, 0 for only its own; they
            are the model's, before penalties, temperature and filters.
        prompt_log_probs: whether the prompt's tokens are to be given log-probabilities, too.
        deadline: when, by `time.monotonic()`, it ends, wherever it has come to.

    Raises:
        ValueError: a number is out of its range, or there are no tokens.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_ids: Sequence[int] | None = None
    stop: Sequence[str] = ()
    log_probs: int | None = None
    prompt_log_probs: bool = False
    deadline: float | None = None

    def __post_init__(self) -> None:  # noqa: D105
        tokens = tuple(whole("tokens", token) for token in self.tokens)
        if not tokens:
            raise ValueError("a request has no tokens: pass at least one, the one that begins a text")
        if whole("max_new_tokens", self.max_new_tokens) < 0:
            raise ValueError(f"{self.max_new_tokens=} must not be negative; 0 only reads the prompt")
        make_sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        bias = {whole("logit_bias", token): real("logit_bias", x) for token, x in self.logit_bias.items()}
        penalties = (
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        )
        for name, number in (*penalties, *(("logit_bias", number) for number in bias.values())):
            if not abs(real(name, number)) < float("inf"):
                raise ValueError(f"{name}={number} must be finite")
        if self.log_probs is not None and not 0 <= whole("log_probs", self.log_probs) <= MOST_LOG_PROBS:
            raise ValueError(f"{self.log_probs=} must be from 0 to {MOST_LOG_PROBS}; None asks for none")
        ends = None if self.stop_ids is None else tuple(whole("stop_ids", token) for token in self.stop_ids)
        if ends is not None and len(ends) > MOST_STOP_IDS:
            raise ValueError(f"{len(ends)} stop_ids are more than {MOST_STOP_IDS}: end texts by stop=")
        clean = dict(tokens=tokens, logit_bias=bias, stop_ids=ends, stop=check_stop(self.stop))
        for name, value in clean.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Token:
    """A token and the text that is certain with it: none while a character or a stop string may go on.

    `top` are the most likely tokens and their log-probabilities.
    """

    id: int
    text: str
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """How a request ended.

    It ended for "stop" at a stop id or string, for "length" at `max_new_tokens`. `tokens` are the new ones,
    the one that ended it included. `cached_tokens` of the prompt were not read again, as another one began
    alike. Of `prompt_log_probs` the first token has none.
    """

    reason: Reason
    tokens: tuple[int, ...]
    text: str
    prompt_tokens: int
    cached_tokens: int
    prompt_log_probs: tuple[Token, ...] | None
    queued_s: float
    read_s: float
    decode_s: float


class Handle:
    """A request under way: its tokens as they come, in a thread or in asyncio; iterate from one place.

    The engine's thread calls `push`, `finish` and `fail`; everything else is for whoever asked.
    """

    def __init__(self, request: Request):
        """Begin without a token."""
        self.request, self.cancelled = request, False
        self._tokens: list[Token] = []
        self._finished: Finished | None = None
        self._error: str | None = None
        self._changed = threading.Condition()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def finished(self) -> Finished | None:
        """How it ended, once it has."""
        return self._finished

    def cancel(self) -> None:
        """End it as soon as may be; nothing happens if it has ended."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> Finished:
        """Wait until it has ended.

        Raises:
            TimeoutError: it has not within `timeout` seconds.
            EngineClosed: it never will.
        """
        with self._changed:
            if not self._changed.wait_for(self._is_over, timeout):
                raise TimeoutError(f"not finished within {timeout} s")
        return self._outcome()

    async def wait(self) -> Finished:
        """`result` in asyncio.

        Raises:
            EngineClosed: see `result`.
        """
        async for _ in self:
            pass
        return self._outcome()

    def __iter__(self) -> Iterator[Token]:
        """Every token, those that have come already included.

        Raises:
            EngineClosed: see `result`.
        """
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: len(self._tokens) > seen or self._is_over())
                new, over = self._tokens[seen:], self._is_over()
            yield from new
            seen += len(new)
            if over:
                self._outcome()
                return

    async def __aiter__(self) -> AsyncIterator[Token]:
        """See `__iter__`."""
        listener = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._listeners.append(listener)
        try:
            seen = 0
            while True:
                listener[1].clear()
                with self._changed:
                    new, over = self._tokens[seen:], self._is_over()
                for token in new:
                    yield token
                seen += len(new)
                if over:
                    self._outcome()
                    return
                if not new:
                    await listener[1].wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def push(self, tokens: Sequence[Token], finished: Finished | None = None) -> None:
        """Tell whoever waits of new tokens, and of the end."""
        with self._changed:
            self._tokens.extend(tokens)
            self._finished = finished
        self._tell()

    def fail(self, why: str) -> None:
        """Tell whoever waits that nothing will come."""
        self._error = why
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        for loop, event in listeners:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop has ended, and nobody listens
                self.cancelled = True

    def _is_over(self) -> bool:
        return self._finished is not None or self._error is not None

    def _outcome(self) -> Finished:
        if self._finished is None:
            raise EngineClosed(str(self._error))
        return self._finished


@dataclass(frozen=True)
class Stats:
    """An engine at a moment; counters are since its start.

    `cache_bytes` are those of all slots, and `full_cache_bytes` what they would weigh with a full cache;
    `reading_bytes` those of the buffer that prompts are read into. On a mesh, arrays count once, as a whole.
    """

    slots: int
    running: int
    reading: int
    queued: int
    context: int
    cache_bytes: int
    full_cache_bytes: int
    reading_bytes: int
    prefix_bytes: int
    prefix_entries: int
    prefix_hits: int
    requests: int
    finished: Mapping[str, int]
    refused: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    tokens_per_s: float
    compile_s: float
    uptime_s: float
    healthy: bool
