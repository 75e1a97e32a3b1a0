"""What an engine runs on the device, compiled before the first request. Read `engine.py` next."""

import concurrent.futures
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.progress import track

from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.generation.requests import Request
from kivi_jax.generation.slots import (
    Asked,
    Burst,
    LogProbs,
    Slots,
    asked_of,
    burst,
    empty_slots,
    insert,
    log_probs_of,
    row_of,
)
from kivi_jax.mesh import KV_HEADS, PARTS, ROWS
from kivi_jax.model.chunks import Reading, Shared, blank_reading, copy_in, copy_out, read_chunk
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import by_device, laid, part_of
from pallas_kernels.pytree import tree_bytes

_SCORED = 16  # tokens of a chunk whose logits exist together


class _Job(NamedTuple):
    """A program to compile: shapes of its arguments, and of what it gives, or of what those lie like."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    gives: Any
    donated: tuple[int, ...] = ()

    def lowered(self, mesh: Mesh | None) -> Lowered:
        """For the devices of a mesh."""
        run = by_device(self.function, mesh, self.arguments, self.gives)
        return jax.jit(run, donate_argnums=self.donated).lower(*self.arguments)


class Programs:
    """The compiled programs, and the state that they work on: a buffer for one prompt, and the slots.

    Nothing is compiled for other shapes than those at the start. Prompts are read in chunks of some `chunks`
    widths, and held in `widths`, the least in which they fit. On a mesh, every program is what each device
    does with its part: slots lie over `data`, and a prompt is read by all of it.
    """

    def __init__(
        self,
        model: Llama,
        strategy: CacheStrategy,
        *,
        slots: int,
        context: int,
        chunk_tokens: int,
        progress: bool,
    ):
        """Compile everything, which `progress` shows."""
        begin = time.perf_counter()
        self.vocab, self.context = model.config.vocab_size, context
        self.chunks = [width for width in (chunk_tokens // 16, chunk_tokens // 4) if width >= 16]
        self.chunks.append(chunk_tokens)
        self.widths, self.shared_bytes = [context], dict[int, int]()
        while self.widths[0] > chunk_tokens:
            self.widths.insert(0, -(-self.widths[0] // 2))
        leaves, tree = jax.tree.flatten(model)  # of a module, in every call, it would take a millisecond
        reading, row = shapes(model, strategy, context=context, chunk_tokens=chunk_tokens)
        mesh, part = model.mesh, part_of(model.config, model.mesh)
        held = _lying(jax.eval_shape(functools.partial(empty_slots, slots=slots), row), mesh, ROWS)
        number, flag = laid((jnp.int32(0), jnp.asarray(np.zeros((), bool))), mesh)
        kept = laid(jnp.asarray(np.zeros(slots, bool)), mesh, ROWS)

        def read(
            leaves: Sequence[Array],
            reading: Reading,
            tokens: Int[Array, "1 T"],
            first: Int[Array, ""],
            lengths: Int[Array, "1"],
            begins: Bool[Array, ""],
            next_tokens: Int[Array, "T"],
            scored: Bool[Array, ""],
        ) -> tuple[Reading, Float[Array, "1 V"], LogProbs]:
            model = jax.tree.unflatten(tree, leaves)
            x, reading = read_chunk(
                model, reading, tokens, first=first, lengths=lengths, begins=begins, strategy=strategy
            )
            last = jnp.clip(lengths - 1 - first, 0, x.shape[1] - 1)
            logits = model.logits(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
            return reading, logits, _score(model, x[0], next_tokens, scored)

        def place(slots: Slots, slot: Int[Array, ""], *read: Any, width: int) -> Slots:
            return insert(slots, row_of(part, strategy, *read, width=width, context=context), slot)

        def run(leaves: Sequence[Array], slots: Slots, *how: Array) -> tuple[Slots, Burst]:
            return burst(jax.tree.unflatten(tree, leaves), slots, *how)

        jobs: dict[tuple[str, int], _Job] = {}
        jobs["burst", 0] = _Job(run, (leaves, held, kept, number, flag), (held, kept), donated=(1,))
        for width in self.chunks:
            one, every = laid(tuple(jnp.asarray(np.zeros(s, np.int32)) for s in (width, (1, width))), mesh)
            args = (leaves, reading, every, number, row.left, flag, one, flag)
            jobs["read", width] = _Job(read, args, (reading, row.logits, number), donated=(1,))
        for width in self.widths:
            args = (held, number, reading, row.logits, row.asked, row.seen, row.left, row.left)
            jobs["place", width] = _Job(functools.partial(place, width=width), args, held, donated=(0,))
            copy = functools.partial(copy_out, width=width)
            shared = laid(jax.eval_shape(copy, reading), mesh, None, KV_HEADS)
            jobs["copy_out", width] = _Job(copy, (reading,), shared)
            jobs["copy_in", width] = _Job(copy_in, (reading, shared), reading, donated=(0,))
            self.shared_bytes[width] = tree_bytes(shared)
        pool = concurrent.futures.ThreadPoolExecutor()  # XLA lets others run while it compiles
        try:
            compiling = {pool.submit(job.lowered(mesh).compile): name for name, job in jobs.items()}
            done = concurrent.futures.as_completed(compiling)
            self._compiled = {
                compiling[future]: future.result()
                for future in track(
                    done,
                    "compiling",
                    total=len(jobs),
                    console=Console(stderr=True),
                    disable=not progress,
                    transient=True,
                )
            }
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # who interrupts waits for none of them
        first = Request(tokens=(0,), max_new_tokens=1)
        asked_of(first, (), model.config.vocab_size)  # JAX compiles copies of arrays, too: not at a request
        self._leaves = leaves
        self.reading, self.slots = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), (reading, held)
        )
        self.compile_s = time.perf_counter() - begin

    def width_of(self, tokens: int) -> int:
        """The least width in which so many tokens fit."""
        return next(width for width in self.widths if width >= tokens)

    def read(
        self, prompt: Sequence[int], first: int, *, begins: bool, scored: bool
    ) -> tuple[int, Float[Array, "1 V"], LogProbs]:
        """Read a chunk of the prompt from token `first` on: how many tokens, and the logits after them."""
        rest = len(prompt) - first
        width = next((width for width in self.chunks if width >= rest), self.chunks[-1])
        tokens = np.zeros(width + 1, np.int32)
        here = prompt[first : first + width + 1]
        tokens[: len(here)] = here
        length = np.full(1, len(prompt), np.int32)
        self.reading, logits, scores = self._compiled["read", width](
            self._leaves,
            self.reading,
            tokens[None, :-1],
            np.int32(first),
            length,
            np.bool_(begins),
            tokens[1:],
            np.bool_(scored),
        )
        return min(rest, width), logits, scores

    def place(
        self, prompt: Sequence[int], logits: Float[Array, "1 V"], asked: Asked, *, left: int, slot: int
    ) -> None:
        """The prompt that has been read becomes a row."""
        seen = np.zeros((1, self.vocab), bool)
        seen[0, list(prompt)] = True
        left_one, length = np.full(1, left, np.int32), np.full(1, len(prompt), np.int32)
        self.slots = self._compiled["place", self.width_of(len(prompt))](
            self.slots, np.int32(slot), self.reading, logits, asked, seen, left_one, length
        )

    def burst(self, kept: Bool[np.ndarray, "S"], *, most: int, stops: bool) -> Burst:
        """Some steps of the rows that are kept; waits for what they have drawn."""
        self.slots, drawn = self._compiled["burst", 0](
            self._leaves, self.slots, kept, np.int32(most), np.bool_(stops)
        )
        return jax.device_get(drawn)

    def copy_out(self, tokens: int) -> Shared:
        """What has been read of so many tokens."""
        return self._compiled["copy_out", self.width_of(tokens)](self.reading)

    def copy_in(self, shared: Shared) -> None:
        """Begin a prompt with what was read of another."""
        self.reading = self._compiled["copy_in", shared[0][0].shape[2]](self.reading, shared)


def shapes(
    model: Llama, strategy: CacheStrategy, *, context: int, chunk_tokens: int
) -> tuple[Reading, Slots]:
    """Shapes of the buffer that prompts are read into, and of a row, which every part of `data` has whole."""
    config, mesh = model.config, model.mesh
    request, vocab = Request(tokens=(0,), max_new_tokens=1), config.vocab_size

    def build(tokens: Int[Array, "1 1"]) -> tuple[Reading, Slots]:
        dtype = model.embedded(tokens).dtype
        reading = blank_reading(config, strategy, width=context + chunk_tokens, dtype=dtype)
        row = row_of(
            config,
            strategy,
            reading,
            jnp.zeros((1, vocab)),
            asked_of(request, (), vocab),
            jnp.zeros((1, vocab), bool),
            tokens[0],
            tokens[0],
            width=context,
            context=context,
        )
        return reading, row

    reading, row = jax.eval_shape(build, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    lying = (
        laid(read, mesh, None, KV_HEADS)._replace(sums=laid(read.sums, mesh, None, PARTS)) for read in reading
    )
    return tuple(lying), _lying(row, mesh, None)


def _lying(slots: Slots, mesh: Mesh | None, rows: str | None) -> Slots:
    """Shapes of slots on a mesh, whose rows lie over this axis."""

    def lay(path: tuple[Any, ...], leaf: Any) -> Any:
        return laid(leaf, mesh, rows, *((KV_HEADS,) if path[0].name == "cache" else ()))

    return jax.tree.map_with_path(lay, slots)


def _score(model: Llama, x: Float[Array, "T D"], token: Int[Array, "T"], scored: Bool[Array, ""]) -> LogProbs:
    """How likely each token was after the one before it, if that is asked; else zeros."""
    pieces = x.shape[0] // math.gcd(x.shape[0], _SCORED)
    split = x.reshape(pieces, -1, x.shape[1]), token.reshape(pieces, -1)

    def score(piece: tuple[Array, Array]) -> LogProbs:
        return log_probs_of(model.logits(piece[0]), piece[1])

    def nothing() -> LogProbs:
        zeros = jax.eval_shape(lambda: jax.lax.map(score, split))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)

    found = jax.lax.cond(scored, lambda: jax.lax.map(score, split), nothing)
    return jax.tree.map(lambda x: x.reshape(token.shape[0], *x.shape[2:]), found)
