"""`DenseTokens`: the ordinary cache. Read `kivi.py` next."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.segments import Step, Tokens, first_visible, round_up, set_slot
from pallas_kernels.device import default_device
from pallas_kernels.partials import AttentionPartial, attend, empty, merge
from pallas_kernels.pytree import pytree, static
from pallas_kernels.residual.ring import Ring, fill, held_tokens, newest_token, slot_of

_FEW = 256  # slots, of which a part would be read no faster
_BLOCK = 128  # slots of a row that are read at a time
_BY_ROW = 2  # times as long a token takes where rows are read one by one, at most


@pytree
class DenseTokens:
    """Full-precision tokens: the ordinary cache, a ring of the window's size where there is a window."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    lengths: Int[Array, "B"]
    window: int | None = static()

    @classmethod
    def from_prompt(
        cls,
        key: Float[Array, "B K P H"],
        value: Float[Array, "B K P H"],
        lengths: Int[Array, "B"],
        *,
        capacity: int,
        window: int | None,
    ) -> "DenseTokens":
        """Hold a right-padded prompt, with room for `capacity` tokens a row."""
        slots = _splittable(capacity)
        slots = slots if window is None else min(slots, window)
        return cls(fill(key, lengths, slots), fill(value, lengths, slots), lengths, window)

    def attend(self, query: Float[Array, "B N H"]) -> AttentionPartial:
        """See `Segment`. Of the slots, no more than some row has filled are read where that saves time."""
        rows, _, slots, _ = self.keys.shape
        start, scale = first_visible(self.lengths, self.window), query.shape[-1] ** -0.5

        def over(slots: int) -> AttentionPartial:
            first = Ring(self.keys[:, :, :slots], self.values[:, :, :slots], self.lengths)
            return first.attend(query, start=start, scale=scale)

        widths = _widths(slots)
        ways = [functools.partial(over, width) for width in widths]
        way = (self.lengths.max() > jnp.asarray(widths[:-1], jnp.int32)).sum()
        if rows > 1 and len(widths) > 1:
            held = jnp.minimum(self.lengths, slots).sum()
            ways.append(functools.partial(self._attend_by_row, query, start, scale))
            way = jnp.where(_BY_ROW * held < rows * jnp.asarray(widths)[way], len(widths), way)
        return jax.lax.switch(way, ways)

    def _attend_by_row(
        self, query: Float[Array, "B N H"], start: Int[Array, "B"], scale: float
    ) -> AttentionPartial:
        """Attention of one row after another, over blocks of the slots that it has filled itself."""
        rows, _, slots, _ = self.keys.shape
        visible = held_tokens(self.lengths, slots) >= start[:, None]
        slot = jnp.arange(_BLOCK)[None]

        def of_row(row: Int[Array, ""]) -> AttentionPartial:
            asked = jax.lax.dynamic_slice_in_dim(query, row, 1)

            def visit(i: Int[Array, ""], partial: AttentionPartial) -> AttentionPartial:
                first = jnp.minimum(i * _BLOCK, slots - _BLOCK)  # the last block is moved back to fit
                is_new = first + slot >= i * _BLOCK
                seen = is_new & jax.lax.dynamic_slice(visible, (row, first), (1, _BLOCK))
                keys, values = (
                    jax.lax.dynamic_slice(x, (row, 0, first, 0), (1, x.shape[1], _BLOCK, x.shape[3]))
                    for x in (self.keys, self.values)
                )
                return merge(partial, attend(asked, keys, values, seen[:, None], scale=scale))

            blocks = -(-jnp.minimum(self.lengths[row], slots) // _BLOCK)
            return jax.lax.fori_loop(0, blocks, visit, empty(asked.shape))

        one_by_one = jax.lax.map(of_row, jnp.arange(rows, dtype=jnp.int32))
        return jax.tree.map(lambda x: x[:, 0], one_by_one)

    def append(self, step: Step) -> "DenseTokens":
        """See `Segment`."""
        slot, may_write = slot_of(self.lengths, self.keys.shape[2]), step.may_write
        return DenseTokens(
            set_slot(self.keys, slot, step.key, may_write),
            set_slot(self.values, slot, step.value, may_write),
            self.lengths + may_write.astype(jnp.int32),
            self.window,
        )

    @classmethod
    def settle(cls, segments: Sequence["DenseTokens"], active: Bool[Array, "B"]) -> tuple["DenseTokens", ...]:
        """Nothing is ever due."""
        del active
        return tuple(segments)

    def grow(self, tokens: int) -> "DenseTokens":
        """See `Segment`: a ring smaller than the window has not wrapped, so slots are added at its end."""
        slots = self.keys.shape[2] + tokens
        added = (slots if self.window is None else min(slots, self.window)) - self.keys.shape[2]
        keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, added), (0, 0))) for x in (self.keys, self.values))
        return DenseTokens(keys, values, self.lengths, self.window)

    def materialize(self) -> Tokens:
        """See `Segment`."""
        position = newest_token(self.lengths, self.keys.shape[2])
        return Tokens(self.keys, self.values, jnp.maximum(position, -1)[:, None])


def _widths(slots: int) -> list[int]:
    """How many of the first slots may be read alone: a quarter or half of them.

    On a CPU, where a step takes as long as the cache takes to be read. XLA copies a part before it reads it:
    a quarter takes 0.3, half 0.7, and three quarters the whole time that all take. A GPU would wait for the
    host to hear which, in every layer; and few slots are read as fast as a part of them.
    """
    if slots < _FEW or default_device().platform != "cpu":
        return [slots]
    return [-(-slots // 4), -(-slots // 2), slots]


def _splittable(capacity: int) -> int:
    """As many slots or, from 4,096 on, up to a sixteenth more (a sixty-fourth from 16,384 on).

    On a GPU, XLA splits attention's sum over many tokens; where it cannot do so evenly, it first copies the
    values, padded: a third of a decode step at 128k tokens. Multiples of a 64th to a 128th are never copied.
    """
    if capacity < 4096:
        return capacity
    return round_up(capacity, max(256, 2 ** capacity.bit_length() // 128))
