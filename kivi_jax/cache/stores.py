"""How a pool holds its tokens: in full precision, or packed. Read `pool.py` next.

A store is slots per row and KV head; a token of one head can be overwritten without touching any other.
KIVI's keys, whose groups span tokens, do not allow that. Packed stores therefore group keys over channels
like values, after an orthonormal Hadamard transform of queries and keys alike: scores stay what they are,
and a channel of outliers, which would spoil its group, is spread over all channels.

Source: the transform is QuaRot's (arXiv 2404.00456); the use for slots that are reused is ours.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
        whole("pool bits", self.bits)
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"pool {self.bits=} must be 1, 2, 4 or 8")
        if self.group_size is not None and whole("pool group_size", self.group_size) < 1:
            raise ValueError(f"pool {self.group_size=} must be positive")
        check_scale_dtype(self.scale_dtype)

    def fit(self, head_dim: int) -> "PoolQuantization":
        """The same with a size for groups, if none was given."""
        if self.group_size is not None:
            return self
        return dataclasses.replace(self, group_size=math.gcd(DEFAULT_GROUP, head_dim))


@runtime_checkable
class TokenStore(Protocol):
    """Keys and values of a pool's slots."""

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Keys, such that `turn(query) . key` is the score, and values."""
        ...

    def turn(self, query: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
        """A query, or a key, in the basis that keys are held in."""
        ...

    def put(
        self, slot: Int[Array, "B K"], key: Float[Array, "B K H"], value: Float[Array, "B K H"]
    ) -> "TokenStore":
        """Write one token per row and head; a slot past the last writes nothing."""
        ...


@pytree
class DenseStore:
    """Full precision."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]

    @classmethod
    def of(cls, keys: Float[Array, "B K M H"], values: Float[Array, "B K M H"], slots: int) -> "DenseStore":
        """A store of `slots` slots, the first M of which hold the given tokens."""
        return cls(_pad_slots(keys, slots), _pad_slots(values, slots))

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """See `TokenStore`."""
        return self.keys, self.values

    def turn(self, query: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
        """See `TokenStore`."""
        return query

    def put(
        self, slot: Int[Array, "B K"], key: Float[Array, "B K H"], value: Float[Array, "B K H"]
    ) -> "DenseStore":
        """See `TokenStore`."""
        row, head = jnp.arange(slot.shape[0])[:, None], jnp.arange(slot.shape[1])[None]

        def set_slot(held: Array, new: Array) -> Array:
            return held.at[row, head, slot].set(new.astype(held.dtype), mode="drop")

        return DenseStore(set_slot(self.keys, key), set_slot(self.values, value))


@pytree
class PackedStore:
    """Codes, keys and values alike grouped over channels; rows and heads are one axis, as slots differ."""

    keys: QuantizedTensor  # [B * K, 1, S, H], S whole pages
    values: QuantizedTensor
    kv_heads: int = static()
    dtype: str = static()  # that tokens are read in
    rotates: bool = static()  # whether the transform is the store's to do: not where keys come turned

    @classmethod
    def of(
        cls,
        keys: Float[Array, "B K M H"],
        values: Float[Array, "B K M H"],
        slots: int,
        packing: PoolQuantization,
        *,
        rotates: bool,
    ) -> "PackedStore":
        """A store of at least `slots` slots, the first M of which hold the given tokens."""
        batch, kv_heads, _, dim = keys.shape
        group_size = packing.fit(dim).group_size
        assert group_size is not None
        slots = -(-slots // PAGE) * PAGE

        def pack(tokens: Array) -> QuantizedTensor:
            return quantize(
                _pad_slots(tokens, slots).reshape(batch * kv_heads, 1, slots, dim),
                bits=packing.bits,
                group_size=group_size,
                group_axis="channel",
                scale_dtype=packing.scale_dtype,
            )

        turned = rotate(keys) if rotates else keys
        return cls(pack(turned), pack(values), kv_heads, keys.dtype.name, rotates)

    def read(self) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """See `TokenStore`: dequantized, which a pool's bound keeps small."""

        def unpack(tokens: QuantizedTensor) -> Array:
            return dequantize(tokens, self.dtype).reshape(-1, self.kv_heads, *tokens.shape[2:])

        return unpack(self.keys), unpack(self.values)

    def turn(self, query: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
        """See `TokenStore`."""
        return rotate(query) if self.rotates else query

    def put(
        self, slot: Int[Array, "B K"], key: Float[Array, "B K H"], value: Float[Array, "B K H"]
    ) -> "PackedStore":
        """See `TokenStore`."""

        def set_slot(held: QuantizedTensor, new: Array) -> QuantizedTensor:
            # A pool's last page may have more slots than the pool: "past the last" is past the store.
            return set_token(held, slot.reshape(-1), new.reshape(slot.size, 1, -1))

        return dataclasses.replace(
            self, keys=set_slot(self.keys, self.turn(key)), values=set_slot(self.values, value)
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
