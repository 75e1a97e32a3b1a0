"""How a pool holds its tokens: in full precision, or packed. Read `pool.py` next.

A store is slots per row and KV head; a token of one head can be overwritten without touching any other.
KIVI's keys, whose groups span tokens, do not allow that. Packed stores therefore group keys over channels
like values, after an orthonormal Hadamard transform of queries and keys alike: scores stay what they are,
and a channel of outliers, which would spoil its group, is spread over all channels. As in KIVI, the newest
tokens are in full precision: they have slots of their own behind the packed ones, and are packed when they
leave these.

Source: the transform is QuaRot's (arXiv 2404.00456); the use for slots that are reused is ours.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from kivi_jax.checks import whole
from pallas_kernels.pytree import pytree, static
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import QuantizedTensor, dequantize, quantize, set_token

DEFAULT_GROUP = 32  # of values, and of keys
ScaleDtype = Literal["float16", "bfloat16", "float32"]


def check_scale_dtype(scale_dtype: str) -> None:
    """Refuse what is no `ScaleDtype`.

    Raises:
        ValueError: that is so.
    """
    if scale_dtype not in get_args(ScaleDtype):
        raise ValueError(f'{scale_dtype=} must be "float16", "bfloat16" or "float32"')


@dataclass(frozen=True, kw_only=True)
class PoolQuantization:
    """How the pool of a decoding phase is packed; groups run over channels, for keys, too."""

    bits: int = 4
    group_size: int | None = None  # 32, or what of it divides the model's heads: see `fit`
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a field is out of its range.
        """
        whole("pool_bits", self.bits)
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"pool_bits={self.bits} must be 1, 2, 4 or 8")
        if self.group_size is not None and whole("pool_group_size", self.group_size) < 1:
            raise ValueError(f"pool_group_size={self.group_size} must be positive")
        check_scale_dtype(self.scale_dtype)

    def fit(self, head_dim: int) -> "PoolQuantization":
        """The same with a size for groups, if none was given."""
        if self.group_size is not None:
            return self
        return dataclasses.replace(self, group_size=math.gcd(DEFAULT_GROUP, head_dim))


class Given(NamedTuple):
    """Tokens that a store begins with, and their positions, ascending; -1: none."""

    keys: Float[Array, "B K M H"]
    values: Float[Array, "B K M H"]
    positions: Int[Array, "B K M"]

    def in_slots(self, slots: int) -> Int[Array, "B K S"]:
        """The positions where the first of so many slots hold the tokens."""
        padding = ((0, 0), (0, 0), (0, slots - self.positions.shape[2]))
        return jnp.pad(self.positions, padding, constant_values=-1)


class Place(NamedTuple):
    """The slot of each head that a step's token takes; past the last one is nowhere."""

    slot: Int[Array, "B K"]
    moved: Int[Array, "B K"] | None = None  # where what stands there goes; None: nothing does

    def get(self, held: Shaped[Array, "B K S *rest"]) -> Shaped[Array, "B K *rest"]:
        """What stands at `slot`."""
        return held.at[*self._head, self.slot].get(mode="clip")

    def put(
        self, held: Shaped[Array, "B K S *rest"], new: Shaped[Array, "B K *rest"]
    ) -> Shaped[Array, "B K S *rest"]:
        """`held` with `new` at `slot`, and at `moved` what stood there."""
        if self.moved is not None:
            held = held.at[*self._head, self.moved].set(self.get(held), mode="drop")
        return held.at[*self._head, self.slot].set(new.astype(held.dtype), mode="drop")

    @property
    def _head(self) -> tuple[Int[Array, "B 1"], Int[Array, "1 K"]]:
        batch, kv_heads = self.slot.shape
        return jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None]


@runtime_checkable
class TokenStore(Protocol):
    """Keys and values of a pool's slots.

    The last `newest` slots, if any, are a ring of the newest tokens: token t of every head is in slot
    t % newest of them, and leaves it for another slot.
    """

    @property
    def newest(self) -> int:
        """How many slots are a ring of the newest tokens."""
        ...

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Keys, such that `turn(query) . key` is the score, and values."""
        ...

    def turn(self, query: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
        """A query, or a key, in the basis that keys are held in."""
        ...

    def put(self, place: Place, key: Float[Array, "B K H"], value: Float[Array, "B K H"]) -> "TokenStore":
        """Write one token per row and head."""
        ...


@pytree
class DenseStore:
    """Full precision."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]

    @classmethod
    def of(cls, given: Given, slots: int) -> tuple["DenseStore", Int[Array, "B K S"]]:
        """A store of `slots` slots, the first M of which hold the given tokens; and what stands in each."""
        return cls(_pad_slots(given.keys, slots), _pad_slots(given.values, slots)), given.in_slots(slots)

    @property
    def newest(self) -> int:
        """See `TokenStore`."""
        return 0

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """See `TokenStore`."""
        return self.keys, self.values

    def turn(self, query: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
        """See `TokenStore`."""
        return query

    def put(self, place: Place, key: Float[Array, "B K H"], value: Float[Array, "B K H"]) -> "DenseStore":
        """See `TokenStore`."""
        return DenseStore(place.put(self.keys, key), place.put(self.values, value))


@pytree
class PackedStore:
    """Codes, keys and values alike grouped over channels, and the newest tokens in full precision."""

    keys: QuantizedTensor  # [B, K, S - R, H], S - R whole pages
    values: QuantizedTensor
    newest_keys: Float[Array, "B K R H"]
    newest_values: Float[Array, "B K R H"]
    rotates: bool = static()  # whether the transform is the store's to do: not where keys come turned

    @classmethod
    def of(
        cls,
        given: Given,
        slots: int,
        packing: PoolQuantization,
        *,
        lengths: Int[Array, "B"],
        newest: int,
        rotates: bool,
    ) -> tuple["PackedStore", Int[Array, "B K S"]]:
        """A store of at least `slots` slots to pack in, and `newest` for the newest tokens before `lengths`.

        Also what stands in each slot.
        """
        batch, kv_heads, _, dim = given.keys.shape
        group_size = packing.fit(dim).group_size
        assert group_size is not None
        slots = -(-slots // PAGE) * PAGE

        def pack(tokens: Array) -> QuantizedTensor:
            return quantize(
                _pad_slots(tokens, slots),
                bits=packing.bits,
                group_size=group_size,
                group_axis="channel",
                scale_dtype=packing.scale_dtype,
            )

        keys = rotate(given.keys) if rotates else given.keys
        is_new = given.positions >= jnp.maximum(lengths - newest, 0)[:, None, None]
        slot = jnp.where(is_new, given.positions % max(newest, 1), newest)  # newest: nowhere
        row, head = (jnp.arange(n).reshape(shape) for n, shape in ((batch, (-1, 1, 1)), (kv_heads, (-1, 1))))

        def ring(tokens: Array, empty: int) -> Array:
            blank = jnp.full((batch, kv_heads, newest, *tokens.shape[3:]), empty, tokens.dtype)
            return blank.at[row, head, slot].set(tokens, mode="drop")

        older = given._replace(positions=jnp.where(is_new, -1, given.positions)).in_slots(slots)
        return (
            cls(pack(keys), pack(given.values), ring(keys, 0), ring(given.values, 0), rotates),
            jnp.concatenate([older, ring(given.positions, -1)], axis=2),
        )

    @property
    def newest(self) -> int:
        """See `TokenStore`."""
        return self.newest_keys.shape[2]

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """See `TokenStore`: dequantized, which a pool's bound keeps small."""

        def unpack(tokens: QuantizedTensor, newest: Array) -> Array:
            return jnp.concatenate([dequantize(tokens, newest.dtype), newest], axis=2)

        return unpack(self.keys, self.newest_keys), unpack(self.values, self.newest_values)

    def turn(self, query: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
        """See `TokenStore`."""
        return rotate(query) if self.rotates else query

    def put(self, place: Place, key: Float[Array, "B K H"], value: Float[Array, "B K H"]) -> "PackedStore":
        """See `TokenStore`: the token that leaves the ring is packed."""
        assert place.moved is not None
        moved, ring = place.moved.reshape(-1), Place(place.slot - self.keys.shape[2])

        def pack(held: QuantizedTensor, newest: Array) -> QuantizedTensor:
            # Slots differ between heads, too: to `set_token` they are rows. Past the last packed slot nothing
            # is written: it is in the ring, or nowhere.
            by_row = jax.tree.map(lambda x: x.reshape(moved.size, 1, *x.shape[2:]), held)
            written = set_token(by_row, moved, ring.get(newest).reshape(moved.size, 1, -1))
            return jax.tree.map(lambda x, like: x.reshape(like.shape), written, held)

        return PackedStore(
            pack(self.keys, self.newest_keys),
            pack(self.values, self.newest_values),
            ring.put(self.newest_keys, self.turn(key)),
            ring.put(self.newest_values, value),
            self.rotates,
        )


def hadamard(size: int) -> Float[np.ndarray, "size size"]:
    """An orthonormal matrix of -1, 0, 1 times a constant: blocks of the largest power of two in `size`."""
    power = size & -size
    block = np.ones((1, 1))
    while block.shape[0] < power:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // power), block) / np.sqrt(power)


def rotate(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """`x . hadamard`: scores of queries and keys that are both rotated are what they were."""
    matrix = jnp.asarray(hadamard(x.shape[-1]), jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), matrix, precision="highest").astype(x.dtype)


def _pad_slots(tokens: Float[Array, "B K M H"], slots: int) -> Float[Array, "B K slots H"]:
    return jnp.pad(tokens, ((0, 0), (0, 0), (0, slots - tokens.shape[2]), (0, 0)))
