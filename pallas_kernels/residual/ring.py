"""Ring addressing: token t lives in slot t % slots. Every buffer of tokens uses it.

A buffer that never overflows is a ring that never wraps, so one formula serves a plain cache, a sliding
window and KIVI's residual.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import partials
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.pytree import pytree, static

NO_TOKEN = jnp.iinfo(jnp.int32).min


class Token(NamedTuple):
    """One token of each row."""

    key: Float[Array, "B K H"]
    value: Float[Array, "B K H"]


@pytree
class Ring:
    """The newest S - `sinks` of the first `lengths[b]` tokens of each row, in full precision, and its first.

    The last `sinks` slots are no part of the ring: they hold the tokens that come before token 0 and are
    numbered -sinks to -1. So everything that counts tokens, packed ones too, starts behind them.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    lengths: Int[Array, "B"]
    sinks: int = static(default=0)

    @property
    def end(self) -> Int[Array, "B"]:
        """The next token's number: negative while the first slots fill."""
        return self.lengths - self.sinks

    def attend(
        self, query: Float[Array, "B N H"], *, start: Int[Array, "B"], scale: float
    ) -> AttentionPartial:
        """Attention over those of its tokens that are not before `start`."""
        visible = held_tokens(self.end, self.keys.shape[2], self.sinks) >= start[:, None]
        return partials.attend(query, self.keys, self.values, visible[:, None], scale=scale)


def attend_token(query: Float[Array, "B N H"], token: Token, *, scale: float) -> AttentionPartial:
    """Attention over one token, which every query sees: a step's own, before it has a slot."""
    visible = jnp.ones((query.shape[0], 1, 1), bool)
    return partials.attend(query, token.key[:, :, None], token.value[:, :, None], visible, scale=scale)


def newest_token(end: Int[Array, "B"], slots: int, slot: Int[Array, "s"] | None = None) -> Int[Array, "B s"]:
    """The newest token before `end[b]` that lives in each slot; negative where there is none.

    `slot` picks some of the slots; by default all of them.
    """
    if slot is None:
        slot = jnp.arange(slots)
    last = end[:, None] - 1
    return last - (last - slot[None, :]) % slots


def held_tokens(end: Int[Array, "B"], slots: int, sinks: int = 0) -> Int[Array, "B S"]:
    """The token in each slot of a `Ring`, `NO_TOKEN` where there is none."""
    newest = newest_token(end, slots - sinks)
    newest = jnp.where(newest >= 0, newest, NO_TOKEN)
    first = jnp.arange(-sinks, 0, dtype=end.dtype)[None]
    return jnp.concatenate([newest, jnp.where(first < end[:, None], first, NO_TOKEN)], axis=1)


def slot_of(token: Int[Array, "B"], slots: int, sinks: int = 0) -> Int[Array, "B"]:
    """Where a `Ring` of so many slots holds a token."""
    return jnp.where(token < 0, slots + token, token % (slots - sinks))


def fill(tokens: Shaped[Array, "B K P H"], end: Int[Array, "B"], slots: int) -> Shaped[Array, "B K slots H"]:
    """A ring that holds the newest tokens before `end[b]` of each row.

    What slots without a token hold is unspecified (finite) and must not be read.
    """
    held = tokens.shape[2]
    if slots >= held:  # nothing wraps: slot t is token t
        return jnp.pad(tokens, ((0, 0), (0, 0), (0, slots - held), (0, 0)))
    token = newest_token(end, slots)[:, None, :, None]
    return jnp.take_along_axis(tokens, jnp.clip(token, 0, held - 1), axis=2)


def merge_residual(
    packed: AttentionPartial,
    query: Float[Array, "B N H"],
    residual: Ring | None,
    own: Token | None,
    *,
    start: Int[Array, "B"],
    scale: float,
) -> AttentionPartial:
    """Attention over packed tokens and what there is of the others: for kernels that cannot do all."""
    merged = packed
    if residual is not None:
        merged = partials.merge(merged, residual.attend(query, start=start, scale=scale))
    if own is not None:
        merged = partials.merge(merged, attend_token(query, own, scale=scale))
    return merged
