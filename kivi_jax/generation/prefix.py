"""A prompt that has been read, and how more tokens join it. Read `generate.py` next.

A `Prefix` is a value: it can be kept, saved (`prefix_files.py`) and continued any number of times. What
follows it is *decoded*, token by token against the compressed cache, just as generated tokens are: nothing
that has been read is read again, and a bounded decoding phase counts a question among its tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from kivi_jax.cache.strategy import CacheStrategy, KVCache, grow, repeat_row
from kivi_jax.checks import instance
from kivi_jax.generation.tokens import CONTEXT
from kivi_jax.mesh import on_every_device
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import placed_cache
from pallas_kernels.pytree import pytree, static

_MARKED = 16  # numbers of a parameter that `weights_mark` looks at
_PRIME = 16777619


@pytree
class Prefix:
    """What is known after reading: everything that continuing needs, besides the model.

    `turn` says that a user's turn of a chat template is open: texts that follow go on in it.
    """

    cache: KVCache
    logits: Float[Array, "B V"]  # of each row's next token
    seen: Bool[Array, "B V"]  # which tokens a row has had, for repetition penalties
    tail: Int[Array, "B C"]  # a row's last tokens, which decide how texts that follow are spelled; -1: none
    mark: UInt32[Array, ""] | None = None  # `weights_mark` of the model that read it, where it is to be kept
    turn: bool = static(default=False)

    @property
    def rows(self) -> int:
        """B: how many texts were read."""
        return self.logits.shape[0]


def check_prefix(prefix: Prefix) -> None:
    """Refuse what is no prefix.

    Raises:
        ValueError: it is none.
    """
    instance("prefix", prefix, Prefix, "pass what read_prefix or load_prefix gave")


def prefill(
    model: Llama,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    *,
    cache: CacheStrategy | str,
    capacity: int,
    block_tokens: int | None = None,
) -> Prefix:
    """Read right-padded prompts; see `Llama.prefill`.

    Raises:
        ValueError: see `Llama.prefill`.
    """
    logits, held = model.prefill(tokens, lengths, cache=cache, capacity=capacity, block_tokens=block_tokens)
    seen, tail = _noted(tokens, lengths, model.config.vocab_size)
    return placed(Prefix(held, logits, seen, tail), model.mesh)


def placed(prefix: Prefix, mesh: Mesh | None) -> Prefix:
    """A prefix, wherever its arrays lie, on a mesh."""
    if mesh is None:
        return prefix
    cache = placed_cache(prefix.cache, mesh, prefix.rows)
    others = on_every_device((prefix.logits, prefix.seen, prefix.tail, prefix.mark), mesh)
    return Prefix(cache, *others, prefix.turn)


@functools.partial(jax.jit, static_argnames=("rows", "more", "mesh"))
def fork(prefix: Prefix, *, rows: int, more: int, mesh: Mesh | None = None) -> Prefix:
    """A copy with room for `more` tokens a row, of `rows` rows: the prefix's own, or its only one repeated.

    On the `mesh`, if there is one.

    `extend` and `Llama.decode` consume the cache they are given; a prefix to be used again is forked first.

    Raises:
        ValueError: the prefix has several rows, and not `rows`.
    """
    if prefix.rows not in (1, rows):
        raise ValueError(
            f"the prefix has {prefix.rows} rows, which cannot be continued by {rows} prompts: "
            f"pass {prefix.rows} prompts, or a prefix of one row"
        )
    times = rows // prefix.rows
    copy = Prefix(
        grow(repeat_row(prefix.cache, times), more),
        jnp.tile(prefix.logits, (times, 1)),
        jnp.tile(prefix.seen, (times, 1)),
        jnp.tile(prefix.tail, (times, 1)),
        prefix.mark,
        prefix.turn,
    )
    return placed(copy, mesh)


@functools.partial(jax.jit, donate_argnames=("prefix",))
def extend(model: Llama, prefix: Prefix, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Prefix:
    """Append right-padded tokens, `lengths[b]` (0 to T) to row b. The prefix passed in is consumed.

    Compiled once per shapes: the loop ends with the longest row, so a wide T costs nothing.
    The caller keeps the cache's `lengths` within its `capacity`.
    """
    if not tokens.shape[1]:
        return prefix

    def advance(i: Array, state: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        logits, cache = state
        active = i < lengths
        new, cache = model.decode(tokens[:, i], cache, active)
        return jnp.where(active[:, None], new, logits), cache

    logits, cache = jax.lax.fori_loop(0, lengths.max(), advance, (prefix.logits, prefix.cache))
    seen = prefix.seen | _seen(tokens, lengths, prefix.seen.shape[1])
    tail = _tail(prefix.tail, tokens, lengths)
    return placed(Prefix(cache, logits, seen, tail, prefix.mark, prefix.turn), model.mesh)


@jax.jit
def weights_mark(model: Llama) -> UInt32[Array, ""]:
    """Tells models of the same shapes apart by some numbers of every parameter, which costs next to nothing.

    Saved prefixes name their model by all of them: see `prefix_files.fingerprint`.
    """
    mark = jnp.uint32(0)
    for parameter in jax.tree.leaves(nnx.state(model)):
        flat = parameter.reshape(-1)
        some = flat[:: max(1, flat.size // _MARKED)][:_MARKED].astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(some, jnp.uint32)
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        mark = mark * jnp.uint32(_PRIME) + (bits * odd).sum(dtype=jnp.uint32)
    return mark


@functools.partial(jax.jit, static_argnames=("vocab",))
def _noted(
    tokens: Int[Array, "B P"], lengths: Int[Array, "B"], vocab: int
) -> tuple[Bool[Array, "B V"], Int[Array, "B C"]]:
    """Which tokens prompts have, and their last ones."""
    tail = jnp.full((tokens.shape[0], CONTEXT), -1)
    return _seen(tokens, lengths, vocab), _tail(tail, tokens, lengths)


def _seen(tokens: Int[Array, "B P"], lengths: Int[Array, "B"], vocab: int) -> Bool[Array, "B V"]:
    """Which tokens stand before each row's length."""
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = jnp.zeros((tokens.shape[0], vocab), bool)
    return seen.at[rows, jnp.where(real, tokens, vocab)].set(True, mode="drop")


def _tail(tail: Int[Array, "B C"], tokens: Int[Array, "B P"], lengths: Int[Array, "B"]) -> Int[Array, "B C"]:
    """The last C tokens of each row, after `lengths` of `tokens` have followed `tail`."""
    joined = jnp.concatenate([tail.astype(jnp.int32), tokens.astype(jnp.int32)], axis=1)
    last = lengths[:, None] + jnp.arange(tail.shape[1])[None]
    return jnp.take_along_axis(joined, last, axis=1)
