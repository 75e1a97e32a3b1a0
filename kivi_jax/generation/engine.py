"""`Engine`: many requests share the slots of one cache, each as if it were alone.

One thread owns the device, and takes turns: end what was cancelled or is late, read a chunk of the next
prompt or, when all is read, give it a slot if one is free, let all rows draw some tokens. A running row so
waits for a chunk at most, and a copy of what prompts share, or for what makes a row of a prompt. Slots,
chunks and bursts are `slots.py`'s and `model/chunks.py`'s; here is who gets them, and when.
"""

import atexit
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Literal

import jax
import numpy as np

from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.segments import round_up
from kivi_jax.cache.strategy import CacheStrategy, full
from kivi_jax.checks import real, warn_beyond, whole
from kivi_jax.generation.generate import check_model, end_ids, warn_unless_finite
from kivi_jax.generation.programs import Programs, shapes
from kivi_jax.generation.requests import (
    EngineClosed,
    Finished,
    Handle,
    QueueFull,
    Reason,
    Request,
    Stats,
    TooLong,
)
from kivi_jax.generation.rows import Row
from kivi_jax.generation.shared_prefixes import SharedPrefixes
from kivi_jax.generation.slots import BURST, LogProbs, asked_of
from kivi_jax.generation.stops import Decoder
from kivi_jax.generation.tokens import Tokenizer, check_tokenizer, ending_ids
from kivi_jax.mesh import KV_HEADS, ROWS, parts_of
from kivi_jax.model.chunks import sharable_tokens
from kivi_jax.model.inputs import check_vocabulary
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import bytes_of_device
from pallas_kernels.pytree import tree_bytes

_log = logging.getLogger(__name__)

_BURST_S = 0.05  # how long rows draw tokens before anyone hears of them, if a burst is that long
_RECENT_S = 5.0  # over which tokens per second are counted


class Engine:
    """Continuous batching: `slots` rows of up to `context` tokens, which requests have one after another.

    A request's tokens are those that `generate` gives it alone, whatever runs beside it. Prompts are read in
    order of arrival. What several of them begin with is read once.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        cache: CacheStrategy | str,
        slots: int | None = None,
        memory_bytes: int | None = None,
        context: int = 4096,
        queue: int = 256,
        prefix_bytes: int = 1 << 28,
        chunk_tokens: int = 256,
        progress: bool = False,
    ):
        """Compile everything that requests may need, and begin to wait for them in a thread.

        Args:
            model: the model. While the engine runs, nobody else is to use the device.
            tokenizer: its tokenizer, for the text of tokens; without one there is none.
            cache: how keys and values are held: a strategy, or its name ("kivi2").
            slots: how many requests run at a time; on a mesh, a multiple of its `data`.
            memory_bytes: instead of `slots`, what weights, slots, shared beginnings of prompts and the buffer
                that prompts are read into may weigh, on a mesh on each device: as many slots as fit.
            context: tokens of a prompt and its continuation, at most.
            queue: how many requests may wait.
            prefix_bytes: what beginnings of prompts may weigh that are kept for others; 0 keeps none.
            chunk_tokens: how many tokens of a prompt are read while running rows wait.
            progress: whether a bar on stderr shows how far compiling is.

        Raises:
            ValueError: the strategy does not fit the model, a number is out of range, or no slot fits.
            NotImplementedError: the model lies on devices of several hosts.
        """
        check_model(model)
        if model.mesh is not None and model.mesh.is_multi_process:
            raise NotImplementedError(
                "an engine runs on devices of one host: start one on each, with a mesh of its own devices"
            )
        self.model, self.tokenizer, self.strategy = model, tokenizer, strategy_of(cache)
        self.strategy.check(model.config)
        for name, number in dict(context=context, queue=queue, chunk_tokens=chunk_tokens).items():
            _positive(name, number)
        if (prefix_bytes := int(real("prefix_bytes", prefix_bytes))) < 0:
            raise ValueError(f"{prefix_bytes=} must not be negative; 0 keeps nothing")
        chunk_tokens = min(chunk_tokens, context)
        warn_beyond(model.config.context, context)
        fixed = bytes_of_device(model) + prefix_bytes // parts_of(model.mesh, KV_HEADS)
        self.slots = _slots(model, self.strategy, slots, memory_bytes, fixed, context, chunk_tokens)
        self.context, self.queue = context, queue
        self._programs = Programs(
            model,
            self.strategy,
            slots=self.slots,
            context=context,
            chunk_tokens=chunk_tokens,
            progress=progress,
        )
        each = self.slots // parts_of(model.mesh, ROWS)
        self._order = sorted(range(self.slots), key=lambda slot: (slot % each, slot))  # one of each device's
        self._cache_bytes = tree_bytes(self._programs.slots.cache)
        self._full_bytes = self.slots * tree_bytes(
            shapes(model, full(), context=context, chunk_tokens=chunk_tokens)[1].cache
        )
        self._reading_bytes = tree_bytes(self._programs.reading)
        self._shared = SharedPrefixes(prefix_bytes)
        self._waiting: deque[Row] = deque()
        self._reading: Row | None = None
        self._rows: dict[int, Row] = {}
        self._changed = threading.Condition()  # guards `_waiting` and the next two
        self._refuses: str | None = None  # why, if it does
        self._closing = False
        self._step_s = _BURST_S / 8
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._recent: deque[tuple[float, int]] = deque()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="kivi_jax.Engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, request: Request) -> Handle:
        """Have a request answered; returns at once.

        Raises:
            ValueError: a token is not in the vocabulary, or stop strings are asked for without a tokenizer.
            TooLong: it does not fit into the context.
            QueueFull: too many wait.
            EngineClosed: the engine takes no requests any more.
        """
        row = self._new(request)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.queue:
                self._counts["refused"] += 1
                raise QueueFull(f"{self.queue} requests wait already: ask again later")
            self._enqueue(row)
        return row.handle

    def complete(self, requests: Iterable[Request]) -> list[Finished]:
        """Have many requests answered, in order; waits where `submit` would find the queue full.

        Raises:
            ValueError: see `submit`; what has been submitted before is cancelled.
            EngineClosed: see `submit`.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                row = self._new(request)
                with self._changed:
                    self._changed.wait_for(lambda: self._refuses or len(self._waiting) < self.queue)
                    self._check_open()
                    self._enqueue(row)
                handles.append(row.handle)
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stats(self) -> Stats:
        """What the engine does now, and has done."""
        now, counts = time.monotonic(), self._counts
        recent = sum(tokens for then, tokens in list(self._recent) if now - then <= _RECENT_S)
        return Stats(
            slots=self.slots,
            running=len(self._rows),
            reading=int(self._reading is not None),
            queued=len(self._waiting),
            context=self.context,
            cache_bytes=self._cache_bytes,
            full_cache_bytes=self._full_bytes,
            reading_bytes=self._reading_bytes,
            prefix_bytes=self._shared.bytes,
            prefix_entries=len(self._shared),
            prefix_hits=counts["prefix_hits"],
            requests=counts["requests"],
            finished=dict(self._reasons),
            refused=counts["refused"],
            prompt_tokens=counts["prompt_tokens"],
            cached_tokens=counts["cached_tokens"],
            new_tokens=counts["new_tokens"],
            tokens_per_s=recent / min(_RECENT_S, max(now - self._started, 1e-9)),
            compile_s=self._programs.compile_s,
            uptime_s=now - self._started,
            healthy=self._refuses is None,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those taken: whether they ended within `timeout` seconds."""
        with self._changed:
            self._refuses = self._refuses or "the engine is being closed"
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._idle() or self._closing, timeout)

    def close(self) -> None:
        """End everything: requests that are under way fail."""
        with self._changed:
            self._refuses = self._refuses or "the engine is closed"
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _new(self, request: Request) -> Row:
        tokens, config = request.tokens, self.model.config
        check_vocabulary(np.asarray([*tokens, *request.logit_bias]), config.vocab_size)
        if request.stop:
            check_tokenizer(self.tokenizer)
        if len(tokens) + request.max_new_tokens > self.context:
            raise TooLong(
                f"{len(tokens)} tokens and {request.max_new_tokens} new ones are more than the engine's "
                f"context of {self.context}: shorten the prompt, or ask for fewer"
            )
        ids = request.stop_ids
        ends = ending_ids(config, self.tokenizer) if ids is None else end_ids(self.model, tuple(ids))
        decoder = (
            Decoder(self.tokenizer, tokens, stop=request.stop, ends=ends)
            if self.tokenizer is not None
            else None
        )
        return Row(Handle(request), ends, decoder)

    def _check_open(self) -> None:
        if self._refuses:
            raise EngineClosed(self._refuses)

    def _enqueue(self, row: Row) -> None:
        self._waiting.append(row)
        self._counts["requests"] += 1
        self._changed.notify_all()

    def _idle(self) -> bool:
        return not (self._waiting or self._reading or self._rows)

    def _work(self) -> None:
        """The thread: turns, until it is closed or something breaks."""
        why = "the engine was closed before this request had ended"
        try:
            while True:
                with self._changed:
                    self._changed.notify_all()  # whoever waits for room, or for the end
                    self._changed.wait_for(lambda: self._closing or not self._idle())
                    if self._closing:
                        break
                self._turn()
        except Exception as error:
            _log.exception("the engine broke down")
            why = f"the engine broke down: {type(error).__name__}: {error}"
        with self._changed:
            self._refuses, self._closing = self._refuses or why, True
            left = [*self._rows.values(), *self._waiting, *([self._reading] if self._reading else [])]
            self._waiting.clear()
            self._rows.clear()
            self._reading = None
            self._changed.notify_all()
        for row in left:
            row.handle.fail(why)

    def _turn(self) -> None:
        self._end_overdue()
        if self._reading is None and self._waiting:
            self._begin()
        ran = self._advance()
        if self._rows:
            self._burst(after=ran)

    def _advance(self) -> Literal["read", "placed"] | None:
        """Run one program of a prompt: read a chunk or, which may take as long, make a row of it."""
        row = self._reading
        if row is not None and row.logits is None:
            self._read_chunk(row)
            return "read"
        if row is not None and len(self._rows) < self.slots:
            self._place(row)
            return "placed"
        return None

    def _end_overdue(self) -> None:
        for slot, row in list(self._rows.items()):
            if reason := row.overdue:
                del self._rows[slot]
                self._finish(row, reason)
        if self._reading is not None and (reason := self._reading.overdue):
            row, self._reading = self._reading, None
            self._finish(row, reason)
        with self._changed:
            overdue: list[tuple[Row, Reason]] = [
                (row, reason) for row in self._waiting if (reason := row.overdue)
            ]
            for row, _ in overdue:
                self._waiting.remove(row)
        for row, reason in overdue:
            self._finish(row, reason)

    def _begin(self) -> None:
        """Take the request that has waited longest, and what is known of its prompt's beginning."""
        with self._changed:
            row = self._reading = self._waiting.popleft()
        row.begun_at = time.monotonic()
        prompt, programs = row.prompt, self._programs
        most = sharable_tokens(self.model.config, self.strategy, len(prompt))
        if not row.request.prompt_log_probs and most:
            match = self._shared.find(prompt, most=most, least=programs.chunks[0])
            if match is not None:
                programs.copy_in(match.shared)
                row.read = row.cached = match.tokens
                self._counts["prefix_hits"] += 1
                self._counts["cached_tokens"] += match.tokens

    def _read_chunk(self, row: Row) -> None:
        prompt, programs, scored = row.prompt, self._programs, row.request.prompt_log_probs
        begins = row.read == row.cached
        read, logits, likely = programs.read(prompt, row.read, begins=begins, scored=scored)
        if scored:
            row.take_prompt(read, jax.device_get(likely))
        row.read += read
        self._counts["prompt_tokens"] += read
        if row.read < len(prompt):
            return
        row.logits, row.read_at = jax.block_until_ready(logits), time.monotonic()
        most = sharable_tokens(self.model.config, self.strategy, len(prompt))
        kept, size = prompt[:most], programs.shared_bytes[programs.width_of(max(most, 1))]
        if most >= programs.chunks[0] and self._shared.wants(kept, size):
            self._shared.add(kept, programs.copy_out(most))
        if not row.request.max_new_tokens:
            self._reading = None
            self._finish(row, "length")

    def _place(self, row: Row) -> None:
        slot = next(slot for slot in self._order if slot not in self._rows)
        assert row.logits is not None
        asked = asked_of(row.request, row.ends, self.model.config.vocab_size)
        left = row.request.max_new_tokens
        self._programs.place(row.prompt, row.logits, asked, left=left, slot=slot)
        self._rows[slot], self._reading, row.logits = row, None, None

    def _burst(self, *, after: Literal["read", "placed"] | None) -> None:
        """Let all rows draw tokens: one each, if a prompt is to be read for a free slot, or became a row.

        `after` is what ran in this turn. After nothing, it waits for nothing and says how long a step takes.
        """
        waits = bool(self._waiting or self._reading)
        hurries = after == "placed" or (waits and len(self._rows) < self.slots)
        most = 1 if hurries else min(BURST, max(1, int(_BURST_S / self._step_s)))
        kept = np.isin(np.arange(self.slots), list(self._rows))
        begin = time.perf_counter()
        drawn = self._programs.burst(kept, most=most, stops=waits)
        if after is None:
            took = (time.perf_counter() - begin) / max(int(drawn.counts.max()), 1)
            self._step_s = (self._step_s + took) / 2
        if not self._counts["not_finite"]:  # said once
            warn_unless_finite(drawn.finite)
            self._counts["not_finite"] += int(not drawn.finite.all())
        now, total = time.monotonic(), int(drawn.counts.sum())
        self._counts["new_tokens"] += total
        self._recent.append((now, total))
        while now - self._recent[0][0] > _RECENT_S:
            self._recent.popleft()
        for slot, row in list(self._rows.items()):
            count = int(drawn.counts[slot])
            likely = LogProbs(*(x[slot, :count] for x in drawn.likely))
            ended = not drawn.active[slot]
            if reason := row.take(drawn.tokens[slot, :count].tolist(), likely, ended=ended):
                del self._rows[slot]
                self._reasons[reason] += 1

    def _finish(self, row: Row, reason: Reason) -> None:
        self._reasons[reason] += 1
        row.end(reason)


def _slots(
    model: Llama,
    strategy: CacheStrategy,
    slots: int | None,
    memory_bytes: int | None,
    fixed: int,
    context: int,
    chunk_tokens: int,
) -> int:
    """The number of slots: given, or as many as fit beside `fixed` bytes and the buffer for reading."""
    data = parts_of(model.mesh, ROWS)
    if (slots is None) == (memory_bytes is None):
        raise ValueError("pass either slots=, how many, or memory_bytes=, which says how many fit")
    if slots is not None:
        if _positive("slots", slots) % data:
            most = round_up(slots, data)
            raise ValueError(
                f"{slots=} do not divide over {data=} devices: pass slots={most}, or a mesh of another data="
            )
        return slots
    reading, row = shapes(model, strategy, context=context, chunk_tokens=chunk_tokens)
    needed, size = fixed + bytes_of_device(reading), bytes_of_device(row)
    if (count := int(real("memory_bytes", memory_bytes) - needed) // size) < 1:
        raise ValueError(
            f"{memory_bytes=} leaves no room for a slot of {size} bytes beside {needed} of weights and "
            "buffers: pass more, a shorter context= or fewer prefix_bytes="
        )
    return count * data


def _positive(name: str, number: int) -> int:
    if (count := whole(name, number)) < 1:
        raise ValueError(f"{name}={count} must be at least 1")
    return count
