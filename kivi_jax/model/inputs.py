"""What callers hand to a model, looked at on the host. Read `llama.py` next.

Kinds and shapes are always known, values outside of a trace only: under a caller's `jax.jit` a token outside
of the vocabulary or a length outside of the prompt is not refused, and the row's logits mean nothing. Whoever
reads a prompt waits for its tokens; a decoding step, which loops call, waits for nothing (see `room_left`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from kivi_jax.cache.strategy import KVCache
from kivi_jax.mesh import on_host

Prompts = Int[Array | np.ndarray, "B P"] | Sequence[Sequence[int]]
PerRow = Int[Array | np.ndarray, "B"] | Sequence[int]


def read_prompts(
    tokens: Any, lengths: Any, *, vocab_size: int, least: int = 1
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """Right-padded prompts and their lengths as int32 arrays.

    What stands at and after a row's length may be anything.

    Raises:
        ValueError: they are no whole numbers, no rows, or not as many rows as lengths; or, where values are
            known, a length is not from `least` to P, or a token is not in the vocabulary.
    """
    tokens, lengths = _whole_numbers("tokens", tokens, 2), _whole_numbers("lengths", lengths, 1)
    if tokens.shape[0] != lengths.shape[0]:
        raise ValueError(f"{tokens.shape=} and {lengths.shape=} must have the same number of rows")
    if not tokens.shape[0]:
        raise ValueError("tokens must have at least one row")
    if not isinstance(lengths, Tracer):
        known = np.asarray(lengths)
        if known.min() < least or known.max() > tokens.shape[1]:
            raise ValueError(
                f"every length must be from {least} to {tokens.shape[1]} (the width of tokens), "
                f"got {known.min()} to {known.max()}"
            )
        if not isinstance(tokens, Tracer):
            real = np.arange(tokens.shape[1])[None] < known[:, None]
            check_vocabulary(np.asarray(tokens)[real], vocab_size)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)


def read_tokens(tokens: Any, *, vocab_size: int) -> Int[Array, "B T"]:
    """Whole rows of tokens as an int32 array.

    Raises:
        ValueError: they are no rows of whole numbers; or, where values are known, not in the vocabulary.
    """
    tokens = _whole_numbers("tokens", tokens, 2)
    if not isinstance(tokens, Tracer):
        check_vocabulary(np.asarray(tokens), vocab_size)
    return jnp.asarray(tokens, jnp.int32)


def read_token(token: Any, *, rows: int, vocab_size: int) -> Int[Array, "B"]:
    """A decoding step's token per row as an int32 array; one that is on a device is not asked for.

    Raises:
        ValueError: it is no whole number per row, or the host knows it, and it is not in the vocabulary.
    """
    token = _whole_numbers("token", token, 1)
    if token.shape[0] != rows:
        raise ValueError(f"{token.shape=} must be ({rows},): one token for each row of the cache")
    if isinstance(token, np.ndarray):
        check_vocabulary(token, vocab_size)
    return (
        token if isinstance(token, jax.Array) and token.dtype == np.int32 else jnp.asarray(token, jnp.int32)
    )


def read_active(active: Any, *, rows: int) -> Bool[Array, "B"] | None:
    """Which rows take a token, as an array of truth values; numbers could as well be rows' indices.

    Raises:
        ValueError: it is none, or not one per row.
    """
    if active is None:
        return None
    active = active if isinstance(active, jax.Array) else np.asarray(active)
    if active.dtype != np.bool_ or active.shape != (rows,):
        raise ValueError(f"active of {active.dtype} {active.shape} must be {rows} truth values, one per row")
    return jnp.asarray(active)


def room_left(cache: KVCache, active: Any) -> int | None:
    """How many steps every row has room for at least, this one included; None in a trace, which cannot know.

    `note_room` writes it on the cache that a step returns, so that a loop asks the device for the lengths
    once, and then only when a row may be full.

    Raises:
        ValueError: the cache was consumed by an earlier step, or a row that is to take a token is full.
    """
    if isinstance(cache.lengths, Tracer):
        return None
    if cache.lengths.is_deleted():
        raise ValueError(
            "this cache was consumed by an earlier step, whose memory the new cache has: "
            "go on with the cache that decode returned, or read the prompt again"
        )
    if (room := cache.__dict__.get("room", 0)) > 0:
        return room
    left = cache.capacity - on_host(cache.lengths)
    if isinstance(active, Tracer):
        return None
    takes = left if active is None else left[np.asarray(active)]
    if takes.size and takes.min() < 1:
        raise ValueError(
            f"a row has reached the cache's capacity={cache.capacity}: "
            "pass a larger capacity to prefill, or stop before"
        )
    return max(1, int(left.min()))


def note_room(cache: KVCache, room: int | None) -> KVCache:
    """The cache, with what `room_left` is to know of it; copies and traces forget it."""
    if room is not None:
        cache.__dict__["room"] = room
    return cache


def _whole_numbers(name: str, numbers: Any, axes: int) -> Any:
    if not isinstance(numbers, jax.Array):
        try:
            numbers = np.asarray(numbers)
        except ValueError:
            raise ValueError(f"the rows of {name} differ in width: pad them on the right") from None
        if not numbers.size:
            numbers = numbers.astype(np.int32)
    if numbers.ndim != axes:
        raise ValueError(f"{name} of shape {numbers.shape} must have {axes} axes, one row per prompt")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, not {numbers.dtype}")
    return numbers


def check_vocabulary(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ValueError: one is not in the vocabulary.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(
            f"token {bad} is not in the model's vocabulary, 0 to {vocab_size - 1}: "
            "it comes from another model's tokenizer"
        )
