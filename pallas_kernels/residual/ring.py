"""Ring addressing: token t lives in slot t % slots. Every buffer of tokens uses it.

A buffer that never overflows is a ring that never wraps, so one formula serves a plain cache, a sliding
window and KIVI's residual.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import partials
from pallas_kernels.partials import AttentionPartial


class Ring(NamedTuple):
    """The newest S tokens before `end[b]` of each row, in full precision."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    end: Int[Array, "B"]

    def attend(
        self, query: Float[Array, "B N H"], *, start: Int[Array, "B"], scale: float
    ) -> AttentionPartial:
        """Attention over those of its tokens that are not before `start`."""
        visible = newest_token(self.end, self.keys.shape[2]) >= jnp.maximum(start, 0)[:, None]
        return partials.attend(query, self.keys, self.values, visible[:, None], scale=scale)


def newest_token(end: Int[Array, "B"], slots: int, slot: Int[Array, "s"] | None = None) -> Int[Array, "B s"]:
    """The newest token before `end[b]` that lives in each slot; negative where there is none.

    `slot` picks some of the slots; by default all of them.
    """
    if slot is None:
        slot = jnp.arange(slots)
    last = end[:, None] - 1
    return last - (last - slot[None, :]) % slots


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
    *,
    start: Int[Array, "B"],
    scale: float,
) -> AttentionPartial:
    """Attention over packed tokens and the residual, if there is one: for kernels that cannot do both."""
    if residual is None:
        return packed
    return partials.merge(packed, residual.attend(query, start=start, scale=scale))
