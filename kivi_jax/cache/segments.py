"""Segments: how a layer's tokens are held. Read `dense.py` and `kivi.py` next.

A *segment* holds some tokens of every row and answers one question, "attend this query to what you hold",
with an `AttentionPartial`. A layer's cache is a tuple of segments; only the last one grows. One decode step:

    attend   every segment answers for the tokens it held before the step
    append   the last segment takes the new token (a value that leaves KIVI's residual is packed here; a pool
             lets another token go)
    settle   once per step, all layers together: KIVI packs the key blocks that became full, and counts

Rows have their own `lengths`; token t of a row is in ring slot t % slots (`pallas_kernels.residual.ring`),
whatever the batch, so a row's quantization groups and its output do not depend on its neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.ordering import after
from pallas_kernels.partials import AttentionPartial

S = TypeVar("S", bound="Segment")


class Step(NamedTuple):
    """What one decode step offers a segment: the new token of each row, and how its query attended."""

    query: Float[Array, "B N H"]  # perhaps float16 beside bfloat16 keys
    key: Float[Array, "B K H"]
    value: Float[Array, "B K H"]
    log_sum_exp: Float[Array, "B N"]  # of the query's scores over all segments and its own token
    active: Bool[Array, "B"]  # rows that have ended append nothing
    attended: Float[Array, "B N H"] | None = None  # the query's output, which must exist before any write

    @property
    def may_write(self) -> Bool[Array, "B"]:
        """`active`, known when the query has attended.

        Appending overwrites what attending reads: without the order, XLA copies each layer's cache.
        """
        return after(self.attended, self.active.astype(jnp.int32)) > 0


class Tokens(NamedTuple):
    """What a segment denotes, slot by slot. `position` is the token's index among those the segment was
    given, -1: no token.
    """

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S H"]
    position: Int[Array, "B #K S"]


@runtime_checkable
class Segment(Protocol):
    """Some tokens of every row of one layer."""

    def attend(self, query: Float[Array, "B N H"]) -> AttentionPartial:
        """Attention of the next token's query over the tokens held that it may see."""
        ...

    def append(self: S, step: Step) -> S:
        """Take the step's token as the newest one; `settle` has to follow."""
        ...

    @classmethod
    def settle(cls: type[S], segments: Sequence[S], active: Bool[Array, "B"]) -> tuple[S, ...]:
        """After a step, do for one segment per layer what is due; `active` rows have just appended."""
        ...

    def grow(self: S, tokens: int) -> S:
        """The same tokens, with room for `tokens` more a row."""
        ...

    def materialize(self) -> Tokens:
        """The tokens held, dequantized. For tests and inspection."""
        ...


def first_visible(lengths: Int[Array, "B"], window: int | None) -> Int[Array, "B"]:
    """The oldest token that the next one, at position `lengths`, may see."""
    return jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window + 1, 0)


def set_slot(
    ring: Float[Array, "B K S H"],
    slot: Int[Array, "B"],
    token: Float[Array, "B K H"],
    write: Bool[Array, "B"],
) -> Float[Array, "B K S H"]:
    """The ring after a token of each row has been written to `slot[b]`, where `write[b]`."""
    slot = jnp.where(write, slot, ring.shape[2])  # out of bounds: dropped
    return ring.at[jnp.arange(slot.shape[0]), :, slot].set(token.astype(ring.dtype), mode="drop")


def round_up(number: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `number`."""
    return -(-number // unit) * unit
