"""Rows that begin and end at their own times, in one pytree: pure functions. Read `engine.py` next.

    insert   a prompt that has been read becomes the row of a slot, in place
    burst    some decode steps of all rows, until one ends or there have been enough

A row's tokens are those it has alone: rows have their own lengths, keys and numbers, and nothing of one goes
into another. So a slot needs no cleaning: a row that ends is inactive, and the next one overwrites it. The
next burst makes it count no tokens, only because those cost time.
On a mesh, slots lie over `data`, and what is here is what each device does with its own.
The names are JetStream's, whose engines this one resembles.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from kivi_jax.cache.strategy import CacheStrategy, KVCache, without
from kivi_jax.config import ModelConfig
from kivi_jax.generation.generate import Draw, draw, is_finite
from kivi_jax.generation.requests import MOST_LOG_PROBS, MOST_STOP_IDS, Request
from kivi_jax.generation.sampling import RowSampler
from kivi_jax.mesh import any_row, first_row, has_rows_elsewhere
from kivi_jax.model.chunks import Reading, hold_reading
from kivi_jax.model.llama import Llama, decode_part
from pallas_kernels.pytree import pytree

BURST = 32  # steps at most


@pytree
class Asked:
    """What requests ask of their rows, an array each; see `Request`."""

    sampler: RowSampler
    seed: UInt32[Array, "S"]
    presence: Float[Array, "S"]
    frequency: Float[Array, "S"]
    bias: Float[Array, "S V"]
    ends: Int[Array, "S E"]  # padded with -1, which is no token
    log_probs: Bool[Array, "S"]


@pytree
class Slots:
    """S rows: `logits` are of each one's next token, yet to be drawn, number `index` of its new ones.

    `left` is how many more it may draw. `seen` are the tokens of its text, and `added` how often it has drawn
    each.
    """

    cache: KVCache
    logits: Float[Array, "S V"]
    asked: Asked
    seen: Bool[Array, "S V"]
    added: Int[Array, "S V"]
    index: Int[Array, "S"]
    left: Int[Array, "S"]
    active: Bool[Array, "S"]


class LogProbs(NamedTuple):
    """Log-probabilities of tokens, and of the most likely ones in their places, best first."""

    token: Float[Array, "*B"]
    top: Int[Array, "*B L"]
    top_log_probs: Float[Array, "*B L"]


class Burst(NamedTuple):
    """What some steps have drawn: of row s the first `counts[s]` tokens."""

    tokens: Int[Array, "S M"]
    counts: Int[Array, "S"]
    active: Bool[Array, "S"]  # rows that have not ended
    finite: Bool[Array, "S"]
    likely: LogProbs  # [S, M]; zeros in steps in which no row asks


def log_probs_of(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> LogProbs:
    """Those of each row's token."""
    every = jax.nn.log_softmax(logits, axis=-1)
    best, ids = jax.lax.top_k(every, min(MOST_LOG_PROBS, logits.shape[1]))
    return LogProbs(jnp.take_along_axis(every, token[:, None], axis=1)[:, 0], ids.astype(jnp.int32), best)


def asked_of(request: Request, ends: Sequence[int], vocab: int) -> Asked:
    """What a request asks of its row."""

    def of(number: float | int, dtype: DTypeLike = np.float32) -> Array:
        return jnp.asarray(np.full(1, number, dtype))

    bias = np.zeros((1, vocab), np.float32)
    for token, added in request.logit_bias.items():
        bias[0, token] = added
    padded = np.full((1, MOST_STOP_IDS), -1, np.int32)
    padded[0, : len(ends)] = ends
    return Asked(
        RowSampler(
            of(request.temperature),
            of(request.top_k, np.int32),
            of(request.top_p),
            of(request.min_p),
            of(request.repetition_penalty),
        ),
        of(request.seed % 2**32, np.uint32),
        of(request.presence_penalty),
        of(request.frequency_penalty),
        jnp.asarray(bias),
        jnp.asarray(padded),
        of(request.log_probs is not None, np.bool_),
    )


def row_of(
    config: ModelConfig,
    strategy: CacheStrategy,
    reading: Reading,
    logits: Float[Array, "1 V"],
    asked: Asked,
    seen: Bool[Array, "1 V"],
    left: Int[Array, "1"],
    lengths: Int[Array, "1"],
    *,
    width: int,
    context: int,
) -> Slots:
    """The row of a prompt that has been read: slots, of which there is one."""
    return Slots(
        hold_reading(config, strategy, reading, lengths, width=width, context=context),
        logits,
        asked,
        seen,
        jnp.zeros(seen.shape, jnp.int32),
        jnp.zeros_like(left),
        left,
        left > 0,
    )


def empty_slots(row: Slots, slots: int) -> Slots:
    """So many inactive rows shaped as `row`, which need be no more than shapes."""
    return jax.tree.map(lambda x: jnp.zeros((slots * x.shape[0], *x.shape[1:]), x.dtype), row)


def insert(slots: Slots, row: Slots, slot: Int[Array, ""]) -> Slots:
    """The slots with a row in one of them. A row's cache that is narrower is the first of its slot."""
    rows = slots.active.shape[0]
    own = slot - first_row(rows)
    is_here = (own >= 0) & (own < rows)

    def write(held: Array, new: Array) -> Array:
        first = (own, *(jnp.int32(0) for _ in range(new.ndim - 1)))
        if has_rows_elsewhere():  # one of whose devices it is: here some row is written again
            new = jnp.where(is_here, new, jax.lax.dynamic_slice(held, first, new.shape))
        return jax.lax.dynamic_update_slice(held, new, first)

    return jax.tree.map(write, slots, row)


def burst(
    model: Llama, slots: Slots, kept: Bool[Array, "S"], most: Int[Array, ""], stops: Bool[Array, ""]
) -> tuple[Slots, Burst]:
    """Up to `most` steps of the rows that are `kept`; if it `stops`, until one has ended.

    The slots of the others are empty from the start, so that attending does not pass through what they had.
    """
    rows, top = slots.active.shape[0], min(MOST_LOG_PROBS, slots.logits.shape[1])
    begun = slots.active & kept
    slots = dataclasses.replace(slots, active=begun, cache=without(slots.cache, ~begun))
    drawn = Burst(
        tokens=jnp.zeros((rows, BURST), jnp.int32),
        counts=jnp.zeros(rows, jnp.int32),
        active=begun,
        finite=jnp.ones(rows, bool),
        likely=LogProbs(
            jnp.zeros((rows, BURST), jnp.float32),
            jnp.zeros((rows, BURST, top), jnp.int32),
            jnp.zeros((rows, BURST, top), jnp.float32),
        ),
    )

    def goes_on(state: tuple[Array, Slots, Burst]) -> Bool[Array, ""]:
        step, slots, _ = state
        one_ended = any_row(slots.active != begun)
        return (step < most) & any_row(slots.active) & ~(stops & one_ended)

    def advance(state: tuple[Array, Slots, Burst]) -> tuple[Array, Slots, Burst]:
        step, slots, drawn = state
        token, finite, likely, slots = _step(model, slots)
        drawn = Burst(
            tokens=drawn.tokens.at[:, step].set(token),
            counts=drawn.counts + drawn.active.astype(jnp.int32),
            active=slots.active,
            finite=drawn.finite & (finite | ~drawn.active),
            likely=jax.tree.map(lambda held, new: held.at[:, step].set(new), drawn.likely, likely),
        )
        return step + 1, slots, drawn

    _, slots, drawn = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), slots, drawn))
    return slots, drawn


def _step(model: Llama, slots: Slots) -> tuple[Int[Array, "S"], Bool[Array, "S"], LogProbs, Slots]:
    """Each row's next token, whether its logit is finite, how likely it was where that is asked, and then.

    The token is decoded, if it is not the row's last.
    """
    asked, active = slots.asked, slots.active
    often = slots.added.astype(jnp.float32)
    logits = slots.logits + asked.bias - asked.frequency[:, None] * often
    logits -= jnp.where(slots.added > 0, asked.presence[:, None], 0)
    state = Draw(jax.vmap(jax.random.key)(asked.seed), slots.seen)
    token, state = draw(asked.sampler, logits, state, slots.index)
    assert state.seen is not None
    wanted = active & asked.log_probs
    rows, top = token.shape[0], min(MOST_LOG_PROBS, logits.shape[1])
    nothing = LogProbs(jnp.zeros(rows), jnp.zeros((rows, top), jnp.int32), jnp.zeros((rows, top)))
    likely = jax.lax.cond(wanted.any(), lambda: log_probs_of(slots.logits, token), lambda: nothing)
    finite = is_finite(slots.logits, token)
    left = slots.left - active.astype(jnp.int32)
    active &= (left > 0) & ~(token[:, None] == asked.ends).any(-1)
    new, cache = decode_part(model, slots.cache, token, active)
    slots = Slots(
        cache,
        jnp.where(active[:, None], new, slots.logits),
        asked,
        state.seen,
        slots.added.at[jnp.arange(rows), token].add(1),
        slots.index + 1,
        left,
        active,
    )
    return token, finite, likely, slots
