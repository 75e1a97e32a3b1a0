"""`KiviTokens`: packed tokens behind a full-precision residual of the newest. Read `pool.py` next.

Two things that the paper does not have make 2 bits hold better on real models. The first `sinks` tokens of
a text are never packed: their keys are unlike all others, and would stretch the groups they are in. And keys
may be turned by a Hadamard matrix before they come here (`strategy.py`): a channel's numbers are then nearly
normal ones, and codes of two bits leave out the ends of their range.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.segments import Step, Tokens, first_visible, round_up, set_slot
from kivi_jax.cache.stores import DEFAULT_GROUP, ScaleDtype, check_scale_dtype
from kivi_jax.checks import instance, whole
from pallas_kernels.dispatch import by_kernel_or_xla
from pallas_kernels.ordering import after
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.pytree import pytree, static
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import (
    QuantizedTensor,
    check_groups,
    dequantize,
    get_block,
    pad_tokens,
    quantize,
    set_block,
    set_token,
)
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.residual.ring import NO_TOKEN, Ring, Token, fill, held_tokens, newest_token, slot_of

_TRIM = 1 / 16  # of the range of turned keys, for codes of two bits: measured, see docs/results-evals.md
_KERNELS = "pallas_kernels.residual.kernel"  # imported where there is a GPU for them


@dataclass(frozen=True, kw_only=True)
class KiviQuantization:
    """How KIVI packs: see `kivi_jax.kivi` for the fields."""

    key_bits: int
    value_bits: int
    key_group_size: int
    value_group_size: int | None  # None: `DEFAULT_GROUP`, or what of it divides the model's heads: see `fit`
    residual_length: int
    scale_dtype: ScaleDtype
    rotate_keys: bool = False
    sinks: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a field is out of its range, or the key group does not divide the residual.
        """
        counts = ["key_bits", "value_bits", "key_group_size", "residual_length", "sinks"]
        for name in counts if self.value_group_size is None else [*counts, "value_group_size"]:
            whole(name, getattr(self, name))
        instance("rotate_keys", self.rotate_keys, bool, "pass True or False")
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in (1, 2, 4, 8):
                raise ValueError(f"{name}={getattr(self, name)} must be 1, 2, 4 or 8")
        for name in ("key_group_size", "value_group_size", "residual_length"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.residual_length % self.key_group_size:
            raise ValueError(
                f"residual_length={self.residual_length} must be a multiple of "
                f"key_group_size={self.key_group_size}: keys leave the residual in whole groups"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative: pass 0 for none")
        check_scale_dtype(self.scale_dtype)

    def fit(self, head_dim: int) -> "KiviQuantization":
        """The same with a size for groups of values, if none was given: a power of two, for the kernels."""
        if self.value_group_size is not None:
            return self
        return dataclasses.replace(self, value_group_size=math.gcd(DEFAULT_GROUP, head_dim))

    def pack_keys(self, keys: Float[Array, "B K S H"]) -> QuantizedTensor:
        """Keys in groups of tokens of one channel."""
        return quantize(
            keys,
            bits=self.key_bits,
            group_size=self.key_group_size,
            group_axis="token",
            scale_dtype=self.scale_dtype,
            trim=_TRIM if self.rotate_keys and self.key_bits == 2 else 0.0,
        )

    def pack_values(self, values: Float[Array, "B K S H"]) -> QuantizedTensor:
        """Values in groups of channels of one token."""
        assert self.value_group_size is not None  # `fit`
        return quantize(
            values,
            bits=self.value_bits,
            group_size=self.value_group_size,
            group_axis="channel",
            scale_dtype=self.scale_dtype,
        )


@pytree
class KiviTokens:
    """KIVI's cache: packed tokens, and the newest R tokens and the first `sinks` in full precision.

    With n tokens behind the sinks and R = residual_length, exactly and at every length:

        packed keys    [0, floor(n / R) * R)     leave the residual a block of R at a time
        packed values  [0, max(0, n - R))        leave it one token at a time

    Attention over [0, n - R) reads the packed store and over the rest the rings. A ring holds what
    attention sees: a key that has been packed is there in its dequantized form until it is overwritten,
    so the boundary between keys and values needs no case of its own, and nothing is quantized twice.

    The sinks are slots behind the ring's (see `Ring`): tokens -sinks to -1, so that no group, block or bound
    knows of them. A window hides them as it hides any other token that it has passed.

    Source: KIVI (arXiv 2402.02750) algorithm 1.
    """

    keys: QuantizedTensor  # [B, K, S, H], groups over tokens
    values: QuantizedTensor  # [B, K, S, H], groups over channels
    key_ring: Float[Array, "B K slots H"]  # R and the sinks
    value_ring: Float[Array, "B K slots H"]
    lengths: Int[Array, "B"]  # sinks included
    window: int | None = static()
    sinks: int = static()

    @classmethod
    def from_prompt(
        cls,
        key: Float[Array, "B K P H"],
        value: Float[Array, "B K P H"],
        lengths: Int[Array, "B"],
        quantization: KiviQuantization,
        *,
        capacity: int,
        window: int | None,
    ) -> "KiviTokens":
        """Pack a right-padded prompt as if its tokens had arrived one by one.

        Raises:
            ValueError: see `check_groups`.
        """
        quantization = quantization.fit(key.shape[3])
        assert quantization.value_group_size is not None
        residual_length, sinks = quantization.residual_length, quantization.sinks
        unit = math.lcm(residual_length, PAGE)
        slots = cls._slots(capacity - sinks, window, residual_length)
        check_groups(
            slots,
            key.shape[3],
            bits=quantization.value_bits,
            group_size=quantization.value_group_size,
            group_axis="channel",
        )
        first_key, first_value = (fill(x[:, :, :sinks], lengths, sinks) for x in (key, value))
        key, value, end = key[:, :, sinks:], value[:, :, sinks:], jnp.maximum(lengths - sinks, 0)
        blocks_end = end // residual_length * residual_length
        # Only as many slots as the prompt can fill are quantized; the rest start as zeros.
        filled = min(slots, round_up(max(key.shape[2], 1), unit))
        packed_keys = quantization.pack_keys(fill(key, blocks_end, filled))
        last_block = get_block(packed_keys, (blocks_end - residual_length) % filled, residual_length)
        recent = newest_token(end, residual_length)
        in_block = (recent < blocks_end[:, None])[:, None, :, None]
        key_ring = jnp.where(in_block, dequantize(last_block, key.dtype), fill(key, end, residual_length))
        return cls(
            keys=pad_tokens(packed_keys, slots),
            values=pad_tokens(quantization.pack_values(fill(value, end, filled)), slots),
            key_ring=jnp.concatenate([key_ring, first_key], axis=2),
            value_ring=jnp.concatenate([fill(value, end, residual_length), first_value], axis=2),
            lengths=lengths,
            window=window,
            sinks=sinks,
        )

    @staticmethod
    def _slots(capacity: int, window: int | None, residual_length: int) -> int:
        """Packed slots: whole pages and whole residuals."""
        needed = capacity if window is None else min(capacity, window + residual_length)
        return round_up(max(needed, 1), math.lcm(residual_length, PAGE))

    @property
    def residual_length(self) -> int:
        """R: how many of the newest tokens the rings hold."""
        return self.key_ring.shape[2] - self.sinks

    @property
    def ring(self) -> Ring:
        """The tokens in full precision."""
        return Ring(self.key_ring, self.value_ring, self.lengths, self.sinks)

    @property
    def end(self) -> Int[Array, "B"]:
        """The next token's number where the first behind the sinks is 0: negative while these fill."""
        return self.ring.end

    def attend(self, query: Float[Array, "B N H"], own: Token | None = None) -> AttentionPartial:
        """See `Segment`; if the query's `own` token is given, over that, too."""
        return quantized_attention(
            query,
            self.keys,
            self.values,
            start=first_visible(self.lengths, self.window) - self.sinks,
            end=self.lengths,
            held_back=self.sinks + self.residual_length,
            residual=self.ring,
            own=own,
        )

    def append(self, step: Step) -> "KiviTokens":
        """See `Segment`: the token joins the rings, the value it displaces is packed; `settle` counts it."""
        values, key_ring, value_ring = by_kernel_or_xla(
            "take_token",
            _KERNELS,
            lambda kernels: kernels.take_token(
                self.values, self.ring, step.key, step.value, step.active, after=step.attended
            ),
            lambda: self._take_token(step),
        )
        return dataclasses.replace(self, values=values, key_ring=key_ring, value_ring=value_ring)

    def _take_token(self, step: Step) -> tuple[QuantizedTensor, Array, Array]:
        """The packed values and the rings after a step."""
        slots = self.values.shape[2]
        leaving = self.end - self.residual_length
        row, ring_slot = jnp.arange(leaving.shape[0]), slot_of(self.end, self.key_ring.shape[2], self.sinks)
        may_write = step.may_write
        packed_slot = jnp.where(may_write & (leaving >= 0), leaving % slots, slots)  # slots: nowhere
        return (
            set_token(self.values, packed_slot, self.value_ring[row, :, ring_slot]),
            set_slot(self.key_ring, ring_slot, step.key, may_write),
            set_slot(self.value_ring, ring_slot, step.value, may_write),
        )

    @classmethod
    def settle(cls, segments: Sequence["KiviTokens"], active: Bool[Array, "B"]) -> tuple["KiviTokens", ...]:
        """Pack the key ring of rows whose block has just become full, and count the token.

        Here and not where each layer takes it: then all layers' lengths are one launch on a GPU.
        """
        end, residual = segments[0].end + 1, segments[0].residual_length
        due = active & (end > 0) & (end % residual == 0)

        def packed_in_place(kernels: Any, segment: "KiviTokens") -> "KiviTokens":
            keys, key_ring = kernels.pack_block(segment.keys, segment.ring, due)
            return dataclasses.replace(segment, keys=keys, key_ring=key_ring)

        packed = by_kernel_or_xla(
            "pack_block",
            _KERNELS,
            lambda kernels: tuple(packed_in_place(kernels, segment) for segment in segments),
            lambda: cls._pack_blocks(segments, due),
        )
        # Counted when all is written, which the old lengths say where: else they would be copied.
        more = after([segment.key_ring for segment in packed], active.astype(jnp.int32))
        return tuple(dataclasses.replace(segment, lengths=segment.lengths + more) for segment in packed)

    @classmethod
    def _pack_blocks(
        cls, segments: Sequence["KiviTokens"], due: Bool[Array, "B"]
    ) -> tuple["KiviTokens", ...]:
        """One conditional serves all layers. It computes only the new blocks: stores are updated in place."""

        def pack_ring(segment: "KiviTokens") -> QuantizedTensor:
            store = segment.keys
            return quantize(
                segment.key_ring[:, :, : segment.residual_length],
                bits=store.bits,
                group_size=store.group_size,
                group_axis="token",
                scale_dtype=store.scale.dtype,
                trim=store.trim,
            )

        def pack_rings() -> tuple[QuantizedTensor, ...]:
            return tuple(pack_ring(segment) for segment in segments)

        def nothing() -> tuple[QuantizedTensor, ...]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pack_rings))

        blocks = jax.lax.cond(due.any(), pack_rings, nothing)
        return tuple(segment._take_block(block, due) for segment, block in zip(segments, blocks, strict=True))

    def _take_block(self, block: QuantizedTensor, due: Bool[Array, "B"]) -> "KiviTokens":
        slot = (self.end + 1 - self.residual_length) % self.keys.shape[2]
        first = self.key_ring[:, :, self.residual_length :]
        seen = jnp.concatenate([dequantize(block, self.key_ring.dtype), first], axis=2)
        return dataclasses.replace(
            self,
            keys=set_block(self.keys, slot, block, due),
            key_ring=jnp.where(due[:, None, None, None], seen, self.key_ring),
        )

    def grow(self, tokens: int) -> "KiviTokens":
        """See `Segment`: as for dense tokens, a store that can still grow has not wrapped."""
        slots = self._slots(self.keys.shape[2] + tokens, self.window, self.residual_length)
        return dataclasses.replace(
            self, keys=pad_tokens(self.keys, slots), values=pad_tokens(self.values, slots)
        )

    def materialize(self) -> Tokens:
        """See `Segment`: the packed slots, then the ring's, then the sinks."""
        packed = held_tokens(self.end - self.residual_length, self.keys.shape[2])
        ring = held_tokens(self.end, self.key_ring.shape[2], self.sinks)
        token, dtype = jnp.concatenate([packed, ring], axis=1), self.key_ring.dtype
        return Tokens(
            jnp.concatenate([dequantize(self.keys, dtype), self.key_ring], axis=2),
            jnp.concatenate([dequantize(self.values, dtype), self.value_ring], axis=2),
            jnp.where(token == NO_TOKEN, -1, token + self.sinks)[:, None],
        )
