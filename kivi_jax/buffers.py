"""Segments: how a layer's tokens are held. Read `cache.py` next.

A *segment* holds some tokens of every row and answers one question, "attend this query to what you hold",
with an `AttentionPartial`. A layer's cache is a tuple of segments; only the last one grows. One decode step:

    attend   every segment answers for the tokens it held before the step
    append   the last segment takes the new token (a value that leaves KIVI's residual is packed here)
    settle   once per step, all layers together: KIVI packs the key blocks that became full

Rows have their own `lengths`; token t of a row is in ring slot t % slots (`pallas_kernels.ring`), whatever
the batch, so a row's quantization groups and its output do not depend on its neighbours.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import partials
from pallas_kernels.dispatch import by_kernel_or_xla
from pallas_kernels.packing import PAGE
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.pytree import pytree, static
from pallas_kernels.quantization import (
    QuantizedTensor,
    check_groups,
    dequantize,
    pad_tokens,
    quantize,
    set_block,
    set_token,
)
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.ring import Ring, fill, newest_token

S = TypeVar("S", bound="Segment")

_KERNELS = "pallas_kernels.residual_kernel"  # imported where there is a GPU for them


class Step(NamedTuple):
    """What one decode step offers a segment: the new token of each row, and how its query attended."""

    query: Float[Array, "B N H"]
    key: Float[Array, "B K H"]
    value: Float[Array, "B K H"]
    log_sum_exp: Float[Array, "B N"]  # of the query's scores over all segments and its own token
    active: Bool[Array, "B"]  # rows that have ended append nothing


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
        """Take the step's token as the newest one."""
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
        """See `Segment`."""
        start, scale = _first_visible(self.lengths, self.window), query.shape[-1] ** -0.5
        return Ring(self.keys, self.values, self.lengths).attend(query, start=start, scale=scale)

    def append(self, step: Step) -> "DenseTokens":
        """See `Segment`."""
        return DenseTokens(
            _set_slot(self.keys, self.lengths, step.key, step.active),
            _set_slot(self.values, self.lengths, step.value, step.active),
            self.lengths + step.active.astype(jnp.int32),
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


@pytree
class KiviTokens:
    """KIVI's cache: packed tokens, and the newest R tokens in full precision.

    With n tokens and R = residual_length, exactly and at every length:

        packed keys    [0, floor(n / R) * R)     leave the residual a block of R at a time
        packed values  [0, max(0, n - R))        leave it one token at a time

    Attention over [0, n - R) reads the packed store and over the rest the rings. A ring holds what
    attention sees: a key that has been packed is there in its dequantized form until it is overwritten,
    so the boundary between keys and values needs no case of its own, and nothing is quantized twice.

    Source: KIVI (arXiv 2402.02750) algorithm 1.
    """

    keys: QuantizedTensor  # [B, K, S, H], groups over tokens
    values: QuantizedTensor  # [B, K, S, H], groups over channels
    key_ring: Float[Array, "B K R H"]
    value_ring: Float[Array, "B K R H"]
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
        key_bits: int,
        value_bits: int,
        key_group_size: int,
        value_group_size: int,
        residual_length: int,
        scale_dtype: str,
    ) -> "KiviTokens":
        """Pack a right-padded prompt as if its tokens had arrived one by one.

        Raises:
            ValueError: `key_group_size` does not divide `residual_length`; or see `check_groups`.
        """
        if residual_length % key_group_size:
            raise ValueError(f"{key_group_size=} must divide {residual_length=}")
        unit = math.lcm(residual_length, PAGE)
        slots = cls._slots(capacity, window, residual_length)
        check_groups(slots, key.shape[3], bits=value_bits, group_size=value_group_size, group_axis="channel")

        def pack_keys(x: Array) -> QuantizedTensor:
            return quantize(
                x, bits=key_bits, group_size=key_group_size, group_axis="token", scale_dtype=scale_dtype
            )

        def pack_values(x: Array) -> QuantizedTensor:
            return quantize(
                x, bits=value_bits, group_size=value_group_size, group_axis="channel", scale_dtype=scale_dtype
            )

        blocks_end = lengths // residual_length * residual_length
        # Only as many slots as the prompt can fill are quantized; the rest start as zeros.
        filled = min(slots, _round_up(key.shape[2], unit))
        last_block = dequantize(pack_keys(fill(key, blocks_end, residual_length)), key.dtype)
        recent = newest_token(lengths, residual_length)
        in_block = (recent < blocks_end[:, None])[:, None, :, None]
        return cls(
            keys=pad_tokens(pack_keys(fill(key, blocks_end, filled)), slots),
            values=pad_tokens(pack_values(fill(value, lengths, filled)), slots),
            key_ring=jnp.where(in_block, last_block, fill(key, lengths, residual_length)),
            value_ring=fill(value, lengths, residual_length),
            lengths=lengths,
            window=window,
        )

    @staticmethod
    def _slots(capacity: int, window: int | None, residual_length: int) -> int:
        """Packed slots: whole pages and whole residuals."""
        needed = capacity if window is None else min(capacity, window + residual_length)
        return _round_up(needed, math.lcm(residual_length, PAGE))

    @property
    def residual_length(self) -> int:
        """R: how many of the newest tokens the rings hold."""
        return self.key_ring.shape[2]

    def attend(self, query: Float[Array, "B N H"]) -> AttentionPartial:
        """See `Segment`."""
        return quantized_attention(
            query,
            self.keys,
            self.values,
            start=_first_visible(self.lengths, self.window),
            end=jnp.maximum(self.lengths - self.residual_length, 0),
            residual=Ring(self.key_ring, self.value_ring, self.lengths),
        )

    def append(self, step: Step) -> "KiviTokens":
        """See `Segment`: the token joins the rings; the value it displaces is packed."""
        values, key_ring, value_ring = by_kernel_or_xla(
            "take_token",
            _KERNELS,
            lambda kernels: kernels.take_token(
                self.values, self.key_ring, self.value_ring, step.key, step.value, self.lengths, step.active
            ),
            lambda: self._take_token(step),
        )
        lengths = self.lengths + step.active.astype(jnp.int32)
        return KiviTokens(self.keys, values, key_ring, value_ring, lengths, self.window)

    def _take_token(self, step: Step) -> tuple[QuantizedTensor, Array, Array]:
        """The packed values and the rings after a step."""
        slots = self.values.shape[2]
        leaving = self.lengths - self.residual_length
        row, ring_slot = jnp.arange(leaving.shape[0]), self.lengths % self.residual_length
        packed_slot = jnp.where(step.active & (leaving >= 0), leaving % slots, slots)  # slots: nowhere
        return (
            set_token(self.values, packed_slot, self.value_ring[row, :, ring_slot]),
            _set_slot(self.key_ring, self.lengths, step.key, step.active),
            _set_slot(self.value_ring, self.lengths, step.value, step.active),
        )

    @classmethod
    def settle(cls, segments: Sequence["KiviTokens"], active: Bool[Array, "B"]) -> tuple["KiviTokens", ...]:
        """Pack the key ring of rows whose block has just become full."""
        lengths, residual = segments[0].lengths, segments[0].residual_length
        due = active & (lengths % residual == 0)

        def packed_in_place(kernels: Any, segment: "KiviTokens") -> "KiviTokens":
            keys, key_ring = kernels.pack_block(segment.keys, segment.key_ring, lengths, due)
            return dataclasses.replace(segment, keys=keys, key_ring=key_ring)

        return by_kernel_or_xla(
            "pack_block",
            _KERNELS,
            lambda kernels: tuple(packed_in_place(kernels, segment) for segment in segments),
            lambda: cls._pack_blocks(segments, due),
        )

    @classmethod
    def _pack_blocks(
        cls, segments: Sequence["KiviTokens"], due: Bool[Array, "B"]
    ) -> tuple["KiviTokens", ...]:
        """One conditional serves all layers. It computes only the new blocks: stores are updated in place."""

        def pack_ring(segment: "KiviTokens") -> QuantizedTensor:
            store = segment.keys
            return quantize(
                segment.key_ring,
                bits=store.bits,
                group_size=store.group_size,
                group_axis="token",
                scale_dtype=store.scale.dtype,
            )

        def pack_rings() -> tuple[QuantizedTensor, ...]:
            return tuple(pack_ring(segment) for segment in segments)

        def nothing() -> tuple[QuantizedTensor, ...]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pack_rings))

        blocks = jax.lax.cond(due.any(), pack_rings, nothing)
        return tuple(segment._take_block(block, due) for segment, block in zip(segments, blocks, strict=True))

    def _take_block(self, block: QuantizedTensor, due: Bool[Array, "B"]) -> "KiviTokens":
        slot = (self.lengths - self.residual_length) % self.keys.shape[2]
        seen = dequantize(block, self.key_ring.dtype)
        return KiviTokens(
            set_block(self.keys, slot, block, due),
            self.values,
            jnp.where(due[:, None, None, None], seen, self.key_ring),
            self.value_ring,
            self.lengths,
            self.window,
        )

    def grow(self, tokens: int) -> "KiviTokens":
        """See `Segment`: as for dense tokens, a store that can still grow has not wrapped."""
        slots = self._slots(self.keys.shape[2] + tokens, self.window, self.residual_length)
        return KiviTokens(
            pad_tokens(self.keys, slots),
            pad_tokens(self.values, slots),
            self.key_ring,
            self.value_ring,
            self.lengths,
            self.window,
        )

    def materialize(self) -> Tokens:
        """See `Segment`: the packed slots, then the ring's."""
        packed = newest_token(self.lengths - self.residual_length, self.keys.shape[2])
        ring = newest_token(self.lengths, self.residual_length)
        dtype = self.key_ring.dtype
        return Tokens(
            jnp.concatenate([dequantize(self.keys, dtype), self.key_ring], axis=2),
            jnp.concatenate([dequantize(self.values, dtype), self.value_ring], axis=2),
            jnp.maximum(jnp.concatenate([packed, ring], axis=1), -1)[:, None],
        )


def attend_token(
    query: Float[Array, "B N H"], key: Float[Array, "B K H"], value: Float[Array, "B K H"]
) -> AttentionPartial:
    """Attention over one visible token per row: a step's own token, before it joins a segment."""
    visible = jnp.ones((query.shape[0], 1, 1), bool)
    scale = query.shape[-1] ** -0.5
    return partials.attend(query, key[:, :, None], value[:, :, None], visible, scale=scale)


def _first_visible(lengths: Int[Array, "B"], window: int | None) -> Int[Array, "B"]:
    """The oldest token that the next one, at position `lengths`, may see."""
    return jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window + 1, 0)


def _set_slot(
    ring: Float[Array, "B K S H"],
    position: Int[Array, "B"],
    token: Float[Array, "B K H"],
    write: Bool[Array, "B"],
) -> Float[Array, "B K S H"]:
    slots = ring.shape[2]
    slot = jnp.where(write, position % slots, slots)  # out of bounds: dropped
    return ring.at[jnp.arange(slot.shape[0]), :, slot].set(token.astype(ring.dtype), mode="drop")


def _splittable(capacity: int) -> int:
    """As many slots or, from 4,096 on, up to a sixteenth more (a sixty-fourth from 16,384 on).

    On a GPU, XLA splits attention's sum over many tokens; where it cannot do so evenly, it first copies the
    values, padded: a third of a decode step at 128k tokens. Multiples of a 64th to a 128th are never copied.
    """
    if capacity < 4096:
        return capacity
    return _round_up(capacity, max(256, 2 ** capacity.bit_length() // 128))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
