"""Ring addressing: token t lives in slot t % slots. Every buffer of tokens uses it.

A buffer that never overflows is a ring that never wraps, so one formula serves a plain cache, a sliding
window and KIVI's residual.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


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
